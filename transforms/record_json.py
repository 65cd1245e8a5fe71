"""Frozen records as canonical JSON: the form in which they are kept on the store and travel between stages.

Knows nothing of Beam; `transforms/coders.py` makes Beam coders of it.
"""

from functools import cache
from typing import Any, Generic, TypeVar, cast

from pydantic import TypeAdapter

from schemas.canonical import Json, canonical_json

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


@cache
def _adapter_of(record_type: type[Any]) -> TypeAdapter[Any]:
    """Built once a type: that takes 5 ms, which a resume would pay for each committed shard."""
    return TypeAdapter(record_type)
