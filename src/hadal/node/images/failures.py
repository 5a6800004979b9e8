"""What the system refuses while images are handled, as errors that say what it was for."""

import errno
from collections.abc import Generator
from contextlib import contextmanager

from hadal.errors import ImageError

__all__ = ["image_errors"]

_FULL = {
    errno.ENOSPC: "free some space there, or run: hadal image prune",
    errno.EDQUOT: "raise the quota, or run: hadal image prune",
    errno.EPERM: "images are stored and mounted by root",
    errno.EACCES: "images are stored and mounted by root",
}


@contextmanager
def image_errors(what: str) -> Generator[None]:
    """Turn an OSError into an ImageError that begins with what was being done.

    Raises:
        ImageError: Instead of the OSError.
    """
    try:
        yield
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        reason = error.strerror or str(error)
        hint = _FULL.get(error.errno or 0)
        raise ImageError(f"cannot {what}{where}: {reason}", hint=hint) from error
