"""Errors of a disk that say which file they are about: those of writing and syncing come without a name."""

from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def naming_file(path: object) -> Generator[None]:
    """Name the file in an OSError that passes and names none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        name_file(error, path)
        raise


def name_file(error: OSError, path: object) -> None:
    """As `naming_file`, for an error that was caught."""
    if error.errno is not None and error.filename is None:
        error.filename = str(path)
