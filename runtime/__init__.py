"""Decoding of diffusion language models from a bundle. See `load`."""

from engines import interrupt

interrupt.starting(__name__)

from runtime.api import Runtime, load  # noqa: E402
from runtime.decoding.controller import StepEvent  # noqa: E402
from runtime.decoding.generate import Output  # noqa: E402

__all__ = ["Output", "Runtime", "StepEvent", "load"]
