"""Opens files of the input that must still be what the scan listed.

Part of *read* and of the scan before the run. A run's fingerprint and its plan stand for one state of every file, so
that a file which is appended to, replaced, touched or deleted before its last row was read ends the run: nothing was
asked by then. Digests would cost a second read of the whole input; size and version or time cost one look-up.
"""

import contextlib
from collections.abc import Generator
from typing import BinaryIO

from moebeam.schemas.errors import InputChanged
from moebeam.schemas.store import storage
from moebeam.schemas.store.file_mark import FileMark, mark_now, mark_open
from moebeam.schemas.store.object_store import is_local


@contextlib.contextmanager
def open_claimed(path: str, claim: FileMark | None) -> Generator[BinaryIO]:
    """Open a file for random-access reading; it must be as claimed when it is opened and when the block ends.

    An error within the block is the change's where there was one.

    Args:
        claim: the mark that the scan listed; None checks nothing.
    Raises:
        InputChanged: it is another file by now, or none.
        OSError: the store failed.
    """
    try:
        source = storage.open_input(path)
    except FileNotFoundError:
        check_claim(path, claim)
        raise
    with source:
        if claim is not None and not claim.is_same(found := mark_open(path, source)):
            raise describe_change(path, claim, found)
        try:
            yield source
        except Exception:
            check_claim(path, claim)
            raise
        check_claim(path, claim)


def check_claim(path: str, claim: FileMark | None) -> None:
    """Raise `InputChanged` unless the file at a path is as claimed.

    Raises:
        OSError: the store failed.
    """
    if claim is None:
        return
    try:
        found = mark_now(path)
    except FileNotFoundError:
        found = None
    if found is None or not claim.is_same(found):
        raise describe_change(path, claim, found)


def describe_change(path: str, claim: FileMark, found: FileMark | None) -> InputChanged:
    """The error of a file that is not as claimed; `found` is None where there is none."""
    mend = (
        "let nothing write to it while it is read, then run again, with another output path unless the file is restored"
    )
    if found is None:
        seen = "no file"
    else:
        seen = found.describe()
        if is_local(path) and found.size == claim.size:
            mend += f"; where only its time changed, touch -d @{claim.time} restores it"
    return InputChanged(
        f"{path}: changed after the job had looked at it: expected {claim.describe()}, found {seen}; {mend}"
    )
