"""Execution contexts of one model, and the cache of the kernels that are compiled for them at run time.

`tensorrt_rtx` finishes kernels on the machine that runs an engine. By default it does so in the background and runs
fallback kernels meanwhile, which a captured graph would keep for ever; so contexts of the fixed profile of a reuse
pass are compiled before their first run. What was compiled is kept in a file of the user's cache folder, so that the
next start compiles nothing. `tensorrt` compiles everything when it builds.
"""

import logging
import os
import re
from pathlib import Path
from typing import Any

from engines.files import write_atomically
from engines.gpu.executor import REUSE
from engines.trt.package import TensorRTPackage

FOLDER = "elastic-diffusion"
logger = logging.getLogger(__name__)


class ContextMaker:
    """Makes contexts without device memory of their own."""

    def __init__(self, package: TensorRTPackage, gpu: str, identity: str):
        """`gpu` names the GPU and its compute capability, `identity` the bundle: a cache is for these alone."""
        trt = package.module
        self.strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.specialisation = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
        name = re.sub(r"[^\w.-]+", "-", f"{package.name}-{package.version}-{gpu}-{identity}")
        self.path = cache_folder() / f"{name}.kernels"
        self.cache: Any = None  # made by the first engine

    def new(self, engine: Any, profile: int) -> Any:
        """A context of `engine` that will run with `profile`; None where TensorRT cannot make one."""
        if self.specialisation is None:
            return engine.create_execution_context(self.strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self.strategy)
        if profile == REUSE:
            config.dynamic_shapes_kernel_specialization_strategy = self.specialisation.EAGER
        if self.cache is None:
            self.cache = self._read(config.create_runtime_cache())
        config.set_runtime_cache(self.cache)
        return engine.create_execution_context(config)

    def _read(self, cache: Any) -> Any:
        """Load the file into a new cache; TensorRT refuses one of another machine, driver or version."""
        try:
            loaded = cache.deserialize(self.path.read_bytes())
            logger.info("kernels of %s %s", self.path, "were compiled before" if loaded else "are of another machine")
        except OSError:
            logger.info("no compiled kernels at %s", self.path)
        return cache

    def save(self) -> None:
        """Keep what was compiled; a folder that cannot be written costs the next start its time and nothing else."""
        if self.cache is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, bytes(self.cache.serialize()))
        except OSError as error:
            logger.info("compiled kernels are not kept: %s", error)


def cache_folder() -> Path:
    """The user's cache folder of this project, as the XDG Base Directory Specification has it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / FOLDER
