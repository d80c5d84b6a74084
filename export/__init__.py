"""From a checkpoint to a bundle. See `build`."""

from engines import interrupt

interrupt.starting(__name__)

from export.build import build  # noqa: E402

__all__ = ["build"]
