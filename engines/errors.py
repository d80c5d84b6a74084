"""The exceptions a user can meet, each one clear sentence with a remedy.

    ElasticError
    ├── CheckpointError   a checkpoint that is missing, damaged or not implemented
    ├── BundleError       a bundle that is missing, incomplete, damaged or too new
    ├── BackendError      a back end that is not installed, not built or fails
    ├── OptionError       an option out of range, or one the policy does not use
    ├── PromptError       a prompt that cannot be decoded
    └── ParityError       a verification beyond its tolerance

Foreign errors are translated where they arise, with the cause chained. Command
lines print the message and exit with 1 (2 for options); `assert` is for
invariants of this project only.
"""


class ElasticError(Exception):
    """Base of all errors this project raises for a user's mistake or a broken file."""

    exit_code = 1


class CheckpointError(ElasticError):
    """The checkpoint cannot be read as a supported model."""


class BundleError(ElasticError):
    """The bundle cannot be loaded or written."""


class BackendError(ElasticError):
    """The back end is not available, or its engine failed."""


class OptionError(ElasticError, ValueError):
    """An option is out of range, contradictory or not used by the policy."""

    exit_code = 2


class PromptError(ElasticError, ValueError):
    """The prompt is empty, too long or holds ids that cannot be decoded."""

    exit_code = 2


class ParityError(ElasticError):
    """Two back ends differ by more than the tolerance."""
