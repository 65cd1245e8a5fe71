"""Deterministic Beam coders for what travels between stages, so that nothing falls back to pickle.

Record batches travel as Arrow IPC streams; the small frozen records (units, runs, shards, receipts) as canonical JSON.
Importing this module registers them.
"""

import io
from typing import Any, Generic, cast

import pyarrow as pa
from apache_beam import coders

from moebeam.schemas.store.record_json import Record, RecordJson


class RecordBatchCoder(coders.Coder):
    """A record batch as an Arrow IPC stream of one batch, schema included."""

    def encode(self, value: pa.RecordBatch) -> bytes:
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, value.schema) as writer:
            writer.write_batch(value)
        return sink.getvalue()

    def decode(self, encoded: bytes) -> pa.RecordBatch:
        return pa.ipc.open_stream(encoded).read_next_batch()

    def is_deterministic(self) -> bool:
        return True

    def to_type_hint(self) -> type:
        return pa.RecordBatch


class RecordCoder(coders.Coder, Generic[Record]):
    """A frozen dataclass as canonical JSON; fields may nest dataclasses, tuples and scalars."""

    def __init__(self, record_type: type[Record]) -> None:
        self._type = record_type
        self._json = RecordJson(record_type)

    def encode(self, value: Record) -> bytes:
        return self._json.encode(value)

    def decode(self, encoded: bytes) -> Record:
        return self._json.decode(encoded)

    def is_deterministic(self) -> bool:
        return True

    def to_type_hint(self) -> type[Record]:
        return self._type

    @classmethod
    def from_type_hint(cls, unused_typehint: type[Record], unused_registry: object) -> "RecordCoder[Record]":
        return cls(unused_typehint)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RecordCoder) and cast("RecordCoder[Any]", other)._type is self._type

    def __hash__(self) -> int:
        return hash((RecordCoder, self._type.__qualname__))

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordCoder, (self._type,)


def register_record(record_type: type[Record]) -> type[Record]:
    """Class decorator: let a frozen dataclass travel between stages as canonical JSON."""
    coders.registry.register_coder(record_type, RecordCoder)
    return record_type


coders.registry.register_coder(pa.RecordBatch, RecordBatchCoder)
