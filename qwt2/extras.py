"""Imports of optional packages and of the files they carry, with an error that names the extra to install."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

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


def packaged_file(name: str) -> Path:
    """Return the path of a file that an installed package of the extra ``real`` carries; the package is not imported.

    Args:
        name: ``package:file``, where the file is relative to the package's folder.

    Raises:
        Qwt2Error: the package is not installed or does not have the file.
    """
    package, _, file = name.partition(":")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        raise Qwt2Error(f"{package} is not installed, but {name} is needed; install it with: pip install 'qwt2[real]'")
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise Qwt2Error(f"the installed package {package} has no file {file!r}; install the version of 'qwt2[real]'")
    return path
