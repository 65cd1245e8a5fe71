"""Frozen records as canonical JSON, as stored and as sent between stages.

On the store a record carries the digest of `sealed_json.py`. `read_record` reads a record that must be whole.
`write_note` and `read_note` are for notes, which may be lost or torn. Free of Beam; `transforms/beam/coders.py` wraps
`RecordJson` in Beam coders.
"""

import json
from functools import cache
from typing import Any, Generic, TypeVar, cast

from pydantic import TypeAdapter

from moebeam.schemas.canonical import Json, canonical_json
from moebeam.schemas.errors import abbreviate
from moebeam.schemas.store import storage
from moebeam.schemas.store.damage import describe_damage
from moebeam.schemas.store.sealed_json import seal_json, unseal_json

Record = TypeVar("Record")


class RecordJson(Generic[Record]):
    """A frozen dataclass as canonical JSON; fields may nest dataclasses, tuples and scalars."""

    def __init__(self, record_type: type[Record]) -> None:
        self._adapter: TypeAdapter[Record] = _get_adapter(record_type)

    def encode(self, value: Record) -> bytes:
        text = canonical_json(cast("Json", self._adapter.dump_python(value, mode="json")))
        # A message may quote a lone surrogate, which UTF-8 cannot encode: it becomes a JSON escape.
        return text.encode(errors="backslashreplace")

    def decode(self, encoded: bytes) -> Record:
        """The record of `encode`.

        Raises:
            ValueError: the bytes are not such a record.
        """
        try:
            return self._adapter.validate_json(encoded)
        except ValueError:
            if b"\\ud" not in encoded:
                raise
            # Only Python's own parser reads the escape of a lone surrogate.
            return self._adapter.validate_python(json.loads(encoded))


def encode_record(record: object) -> bytes:
    """A record as it is stored."""
    return seal_json(RecordJson(type(record)).encode(record))


def decode_record(content: bytes, record_type: type[Record]) -> Record:
    """The record of `encode_record`, or one that an older version stored without a digest.

    Raises:
        ValueError: it is not what was stored, or no such record.
    """
    return RecordJson(record_type).decode(unseal_json(content))


def read_record(path: str, record_type: type[Record], what: str) -> Record | None:
    """The record at a path, or None where there is none.

    Args:
        what: the record's name in messages, such as `a commit record`.
    Raises:
        FileDamaged: the record is there but cannot be read.
        OSError: the store failed.
    """
    if not storage.exists(path):
        return None
    try:
        return decode_record(storage.read_bytes(path), record_type)
    except ValueError as error:
        raise describe_damage(path, f"expected {what}, found: {abbreviate(str(error))}") from error


def write_note(path: str, note: object) -> None:
    """Write a record that may be lost with the machine; replaces an earlier one at the path.

    Raises:
        OSError: the store failed.
    """
    storage.write_note(path, encode_record(note))


def read_note(path: str, record_type: type[Record]) -> Record | None:
    """The note at a path; None where there is none or it cannot be read.

    Fields that the record does not know are ignored.
    """
    try:
        return decode_record(storage.read_bytes(path), record_type)
    except (OSError, ValueError):
        return None


@cache
def _get_adapter(record_type: type[Any]) -> TypeAdapter[Any]:
    """Built once per type: it takes 5 ms, which a resume would pay for each committed shard."""
    return TypeAdapter(record_type)
