"""The exceptions a user can meet, each one clear sentence with a remedy.

    ElasticError
    ├── CheckpointError   a checkpoint that is missing, damaged or not implemented
    ├── BundleError       a bundle that is missing, incomplete or damaged
    │   └── NewerBundleError    … or of a later version of this project
    ├── BackendError      a back end that is not installed, not built or fails
    │   └── DeviceError         … or whose device is missing, or not the one it was built for
    ├── OptionError       an option out of range, or one the policy does not use
    ├── PromptError       a prompt that cannot be decoded
    └── ParityError       a verification beyond its tolerance

Foreign errors are translated where they arise, with the cause chained. Command
lines print the message and exit with 1 (2 for options); `assert` is for
invariants of this project only.
"""

INSTALL = "pip install 'elastic-diffusion[{extra}]'"  # the remedy for what is not installed


class ElasticError(Exception):
    """Base of all errors this project raises for a user's mistake or a broken file."""

    exit_code = 1


class CheckpointError(ElasticError):
    """The checkpoint cannot be read as a supported model."""


class BundleError(ElasticError):
    """The bundle cannot be loaded or written."""


class NewerBundleError(BundleError):
    """The bundle was written by a later version of this project."""


class BackendError(ElasticError):
    """The back end is not available, or its engine failed."""


class DeviceError(BackendError):
    """The back end's device is missing, or its engines were built for another."""


class OptionError(ElasticError, ValueError):
    """An option is out of range, contradictory or not used by the policy."""

    exit_code = 2


class PromptError(ElasticError, ValueError):
    """The prompt is empty, too long or holds ids that cannot be decoded."""

    exit_code = 2


class ParityError(ElasticError):
    """Two back ends differ by more than the tolerance."""
