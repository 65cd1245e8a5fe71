"""Says of a file that it is not what was written, and what to do."""

import re

from moebeam.schemas.errors import FileDamaged

_OF_A_RUN = re.compile(r"(.*)/(?:_moebeam/.+|(?:results|rejects|ledger|partial)/[^/]+|manifest\.json)")


def describe_damage(path: str, found: str) -> FileDamaged:
    """The error of a damaged file; `found` says how it differs from what was written."""
    return FileDamaged(f"{path}: is damaged: {found}; {_advise_repair(path)}")


def _advise_repair(path: str) -> str:
    found = _OF_A_RUN.fullmatch(path)
    output = found[1] if found is not None else "OUTPUT"
    return f"moebeam repair {output} says what is lost, and sets aside what the next run can make again"
