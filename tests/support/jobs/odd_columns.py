"""Columns of every type that Parquet takes, with the extremes of each: what passes through a run untouched."""

import datetime as dt
import uuid
from decimal import Decimal
from typing import Any

import pyarrow as pa

_MIN, _MAX = -(2**63), 2**63 - 1
UUID = uuid.UUID("7ed4bffc-f189-40b0-9090-c58e1cba14b8")


class Celsius(pa.ExtensionType):
    """An extension that nobody else knows."""

    def __init__(self) -> None:
        super().__init__(pa.float32(), "tests.celsius")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"v1"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> "Celsius":
        return cls()


def extend(extension: Any, values: list[Any]) -> Any:
    """An array of an extension type; nulls are None."""
    return pa.ExtensionArray.from_storage(extension, pa.array(values, extension.storage_type))


def as_unregistered(name: str, array: Any) -> tuple["pa.Field[Any]", Any]:
    """A field and a column as a reader has them that does not know the extension."""
    metadata = {"ARROW:extension:name": "tests.celsius", "ARROW:extension:metadata": "v1"}
    return pa.field(name, array.type.storage_type, metadata=metadata), array.storage


def odd_columns() -> dict[str, Any]:
    """Arrays of three rows: an extreme, a null where the type's readers allow it, and an ordinary value."""
    texts = pa.array(["b", None, "a"])
    floats: Any = pa.array([[0.1, 2.0], [3.0, 4.0], [5.0, 6.0]], pa.list_(pa.float32(), 2))
    nested = pa.struct([("at", pa.timestamp("us")), ("more", pa.list_(pa.struct([("n", pa.duration("us"))])))])
    return {
        "bool": pa.array([True, None, False]),
        "uint64": pa.array([2**64 - 1, None, 0], pa.uint64()),
        "int64": pa.array([_MIN, None, _MAX]),
        "int8": pa.array([-128, None, 127], pa.int8()),
        "float16": pa.array([65504, None, 0.1], pa.float16()),
        "float32": pa.array([3.4e38, None, 0.1], pa.float32()),
        "float64": pa.array([float("nan"), None, float("-inf")]),
        "decimal32": pa.array([Decimal("-9.999"), None, Decimal("0.001")], pa.decimal32(4, 3)),
        "decimal64": pa.array([Decimal("9" * 18), None, Decimal(1)], pa.decimal64(18, 0)),
        "decimal128": pa.array([Decimal("9" * 38), None, Decimal(1)], pa.decimal128(38, 0)),
        "decimal256": pa.array([Decimal("9" * 76), None, Decimal(1)], pa.decimal256(76, 0)),
        "date32": pa.array([2**31 - 1, None, 0], pa.int32()).view(pa.date32()),
        "date32_min": pa.array([-(2**31), None, 0], pa.int32()).view(pa.date32()),
        "date64": pa.array([dt.date(9999, 12, 31), None, dt.date(1, 1, 1)], pa.date64()),
        "time32": pa.array([86_399_999, None, 0], pa.int32()).view(pa.time32("ms")),
        "time64_us": pa.array([86_399_999_999, None, 0], pa.int64()).view(pa.time64("us")),
        "time64_ns": pa.array([86_399_999_999_999, None, 1], pa.int64()).view(pa.time64("ns")),
        "timestamp_s": pa.array([dt.datetime(9999, 12, 31), None, dt.datetime(1970, 1, 1)], pa.timestamp("s")),
        "timestamp_ms": pa.array([_MAX, None, 0], pa.int64()).view(pa.timestamp("ms")),
        "timestamp_us": pa.array([_MAX, None, _MIN + 1], pa.int64()).view(pa.timestamp("us")),
        "timestamp_ns": pa.array([_MAX, None, 1], pa.int64()).view(pa.timestamp("ns")),
        "timestamp_14000": pa.array([379_638_835_200_000_000, None, 0], pa.int64()).view(pa.timestamp("us", "UTC")),
        "timestamp_east": pa.array([253_402_300_799_999_999, None, 0], pa.int64()).view(
            pa.timestamp("us", "Asia/Tokyo")
        ),
        "timestamp_offset": pa.array([0, None, 1], pa.int64()).view(pa.timestamp("us", "+05:30")),
        "timestamp_no_zone": pa.array([0, None, 1], pa.int64()).view(pa.timestamp("us", "Mars/Phobos")),
        "duration_s": pa.array([_MAX, None, _MIN], pa.int64()).view(pa.duration("s")),
        "duration_us": pa.array([_MAX, None, _MIN], pa.int64()).view(pa.duration("us")),
        "duration_ns": pa.array([_MAX, None, 1], pa.int64()).view(pa.duration("ns")),
        "null": pa.nulls(3),
        "string": texts,
        "large_string": texts.cast(pa.large_string()),
        "string_view": pa.array(["b", None, "a"], pa.string_view()),
        "binary": pa.array([b"\xff\x00", None, b"a"]),
        "binary_view": pa.array([b"\xff\x00", None, b"a"], pa.binary_view()),
        "fixed_size_binary": pa.array([b"\xff\x00", None, b"ab"], pa.binary(2)),
        "dictionary": texts.dictionary_encode(),
        "ordered_dictionary": pa.DictionaryArray.from_arrays(
            pa.array([2, None, 0], pa.int8()), pa.array(["low", "medium", "high"]), ordered=True
        ),
        "list": pa.array([[_MAX, None], None, []], pa.list_(pa.int64())),
        "large_list": pa.array([[b"\xff"], None, []], pa.large_list(pa.binary())),
        "list_view": pa.array([[1, 2], None, []], pa.list_view(pa.int32())),
        "list_of_dictionaries": pa.ListArray.from_arrays(
            pa.array([0, None, 1, 3], pa.int32()), texts.dictionary_encode()
        ),
        "list_of_uuids": pa.ListArray.from_arrays(
            pa.array([0, None, 1, 1], pa.int32()), extend(pa.uuid(), [UUID.bytes])
        ),
        "fixed_size_list": floats,
        "list_of_fixed_size_lists": pa.ListArray.from_arrays(pa.array([0, None, 1, 3], pa.int32()), floats),
        "map": pa.array([[("a", 2.5), ("a", None)], None, []], pa.map_(pa.string(), pa.float64())),
        "struct": pa.array([{"at": None, "more": [None, {"n": None}]}, None, {}], nested),
        "struct_of_uuid": pa.StructArray.from_arrays([extend(pa.uuid(), [UUID.bytes, None, b"\xff" * 16])], ["id"]),
        "uuid": extend(pa.uuid(), [UUID.bytes, None, b"\xff" * 16]),
        "json": extend(pa.json_(), ['{"a": 1}', None, "[]"]),
        "bool8": extend(pa.bool8(), [1, None, 0]),
        "tensor": extend(pa.fixed_shape_tensor(pa.float32(), [1, 2]), floats.to_pylist()),
        "opaque": extend(pa.opaque(pa.int64(), "geometry", "elsewhere"), [_MAX, None, 1]),
        "celsius": extend(Celsius(), [0.1, None, -273.15]),
    }
