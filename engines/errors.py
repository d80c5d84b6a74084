"""The exceptions for users, each one clear sentence with a remedy.

    ElasticError
    ├── CheckpointError   a checkpoint that is missing, damaged or not implemented
    │   └── RangeError          one whose numbers leave the range of a precision
    ├── BundleError       a bundle that is missing, incomplete or damaged
    │   └── NewerBundleError    a bundle of a later version of this project
    ├── BackendError      a back end that is not installed, or whose engine fails
    │   └── DeviceError         a device that is missing, or not the one that engines were built for
    ├── OptionError       an option that is out of range, contradictory or not used
    ├── PromptError       a prompt that cannot be decoded
    └── ParityError       two back ends that differ by more than a tolerance

Errors of other libraries are translated where they arise, with the cause
chained. Command lines print the message and exit with `exit_code`; `assert` is
for invariants of this project only.
"""

INSTALL = "pip install 'elastic-diffusion[{extra}]'"  # the remedy where a package is not installed


class ElasticError(Exception):
    """Base of all errors that this project raises for a mistake of the user or a damaged file."""

    exit_code = 1


class CheckpointError(ElasticError):
    """The checkpoint cannot be read as a supported model."""


class RangeError(CheckpointError):
    """Numbers of the checkpoint leave the range of a precision."""


class BundleError(ElasticError):
    """The bundle cannot be loaded or written."""


class NewerBundleError(BundleError):
    """The bundle was written by a later version of this project."""


class BackendError(ElasticError):
    """The back end is not available, or its engine failed."""


class DeviceError(BackendError):
    """The back end's device is missing, or its engines were built for another."""


class OptionError(ElasticError, ValueError):
    """An option is out of range, contradictory or not used."""

    exit_code = 2


class PromptError(ElasticError, ValueError):
    """The prompt is empty, too long or holds ids that cannot be decoded."""

    exit_code = 2


class ParityError(ElasticError):
    """Two back ends differ by more than the tolerance."""
