"""One writer at a time in the folder of a bundle."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engines.errors import BundleError

LOCK = ".lock"  # held by what writes the folder: a build, a calibration
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the lock of the folder `root`; raises BundleError while another process does, or without locks, OSError."""
    with (root / LOCK).open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BundleError(f"another build or calibration is writing {root}; wait until it has ended") from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise BundleError(
                f"{root} is on a file system without locks ({error.strerror}); use a folder on another one"
            ) from error
        yield
