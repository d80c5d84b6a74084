"""From a checkpoint to a bundle. See `build`."""

from export.build import build

__all__ = ["build"]
