"""Frozen records as canonical JSON: the form in which they are kept on the store and travel between stages.

Knows nothing of Beam; `transforms/beam/coders.py` makes Beam coders of it.
"""

from functools import cache
from typing import Any, Generic, TypeVar, cast

from pydantic import TypeAdapter

from moebeam.schemas.canonical import Json, canonical_json
from moebeam.schemas.errors import CommitError, abbreviated
from moebeam.schemas.store import storage

Record = TypeVar("Record")


class RecordJson(Generic[Record]):
    """A frozen dataclass as canonical JSON; fields may nest dataclasses, tuples and scalars."""

    def __init__(self, record_type: type[Record]) -> None:
        self._adapter: TypeAdapter[Record] = _adapter_of(record_type)

    def encode(self, value: Record) -> bytes:
        return canonical_json(cast("Json", self._adapter.dump_python(value, mode="json"))).encode()

    def decode(self, encoded: bytes) -> Record:
        """The record of `encode`.

        Raises:
            ValueError: the bytes are not such a record.
        """
        return self._adapter.validate_json(encoded)


def read_record(path: str, record_type: type[Record], what: str) -> Record | None:
    """The record that is kept at a path, or None where there is none.

    Args:
        what: the record's name in messages, such as `a commit record`.
    Raises:
        CommitError: the record is there but cannot be read.
        OSError: the store failed.
    """
    if not storage.exists(path):
        return None
    try:
        return RecordJson(record_type).decode(storage.read_bytes(path))
    except ValueError as error:
        raise CommitError(f"{path}: expected {what}, found {abbreviated(str(error))}") from error


@cache
def _adapter_of(record_type: type[Any]) -> TypeAdapter[Any]:
    """Built once a type: that takes 5 ms, which a resume would pay for each committed shard."""
    return TypeAdapter(record_type)
