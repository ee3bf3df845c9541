"""Imports of optional packages, with an error that names the extra to install."""

from collections.abc import Iterator
from contextlib import contextmanager

from qwt2.errors import Qwt2Error


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Wrap imports of packages that belong to the extra ``name`` (see pyproject.toml).

    Raises:
        Qwt2Error: if one of them cannot be imported; the message says how to install the extra.
    """
    try:
        yield
    except ImportError as error:
        missing = (error.name or "a package").partition(".")[0]
        reason = str(error).splitlines()[0]
        raise Qwt2Error(
            f"{missing} cannot be imported ({reason}); install it with: pip install 'qwt2[{name}]'"
        ) from error
