"""Arrow files read in part."""

import io
import random

import pyarrow as pa
import pytest

from moebeam.schemas.arrow import encode_arrow_file, open_arrow_file

TABLE = pa.table(
    {
        "key": [f"k{row}" for row in range(200)],
        "messages": [random.Random(row).randbytes(4000) for row in range(200)],
        "row": list(range(200)),
    }
)


class CountedFile(io.BytesIO):
    """A file that counts the bytes that are read of it."""

    num_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        self.num_read += len(content)
        return content


def test_named_columns_come_alone_and_nothing_of_the_others_is_read() -> None:
    source = CountedFile(encode_arrow_file(TABLE, max_batch_rows=64))
    with open_arrow_file(source, ["row", "key"]) as reader:
        assert reader.read_all().equals(TABLE.select(["key", "row"]))
    assert 0 < source.num_read < 50_000 < 200 * 4000


def test_all_columns_come_where_none_is_named() -> None:
    with open_arrow_file(io.BytesIO(encode_arrow_file(TABLE, max_batch_rows=64))) as reader:
        assert reader.read_all().equals(TABLE)


def test_a_column_that_the_file_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="'absent'"):
        open_arrow_file(io.BytesIO(encode_arrow_file(TABLE, max_batch_rows=64)), ["key", "absent"])
