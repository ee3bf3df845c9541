"""The one exception for mistakes a user can repair, and what command lines make of it."""

import errno
import sys
from collections.abc import Callable

# The system's own refusals that a user can do something about.
_REPAIRABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


class Qwt2Error(Exception):
    """A problem with the input, named in one sentence together with what to do about it.

    Whoever runs the library from the command line prints only the sentence and exits with code 2
    (:func:`guarded`); any other exception is a defect in the library and keeps its traceback.
    """


def guarded(action: Callable[[], None]) -> None:
    """Run `action`; turn what a user can repair into one sentence on stderr and exit code 2."""
    try:
        action()
    except Qwt2Error as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in _REPAIRABLE:
            raise
        _fail(
            f"cannot write {error.filename or 'a result'}: {error.strerror}; make room or give access, then run again"
        )


def _fail(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)
