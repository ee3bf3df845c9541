"""The exception for mistakes that a user can repair, and its handling in commands."""

import errno
import sys
from collections.abc import Callable

# Errors of the operating system that a user can repair.
_REPAIRABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


class Qwt2Error(Exception):
    """A problem with the input; the message is one sentence that names the problem and what to do about it.

    Commands print only the message and exit with code 2 (:func:`guarded`). Any other exception is a defect of the
    library and keeps its traceback.
    """


def guarded(action: Callable[[], None], silent: bool = False) -> None:
    """Run ``action``; turn errors that a user can repair into one sentence on stderr and exit code 2.

    Args:
        action: what to run.
        silent: whether to leave out the sentence, because another process says the same.
    """
    try:
        action()
    except Qwt2Error as error:
        _fail(str(error), silent)
    except OSError as error:
        if error.errno not in _REPAIRABLE:
            raise
        _fail(
            f"cannot write {error.filename or 'a result'}: {error.strerror}; make room or give access, then run again",
            silent,
        )


def _fail(sentence: str, silent: bool) -> None:
    if not silent:
        print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)
