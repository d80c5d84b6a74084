"""Decoding of diffusion language models from a bundle. See `load`."""

from runtime.api import Runtime, load
from runtime.controller import StepEvent
from runtime.generate import Output

__all__ = ["Output", "Runtime", "StepEvent", "load"]
