"""Sealed files: their content comes back in any piece, and no damaged byte is ever read."""

import random
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.schemas.arrow import encode_arrow_file, open_arrow_file
from moebeam.schemas.errors import FileDamaged
from moebeam.schemas.store.sealed_file import ARROW_END, BLOCK_BYTES, check_sealed, open_sealed, read_sealed, seal

SIZES = (0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 7)


@pytest.mark.parametrize("size", SIZES)
def test_content_comes_back_whole_and_in_pieces(tmp_path: Path, size: int) -> None:
    dice = random.Random(size)
    content, path = dice.randbytes(size), tmp_path / "file"
    path.write_bytes(seal(content))
    assert read_sealed(str(path), ARROW_END) == content
    check_sealed(str(path), ARROW_END)
    with open_sealed(str(path), ARROW_END) as source:
        for _ in range(20):
            start, length = dice.randrange(size + 2), dice.randrange(2 * BLOCK_BYTES)
            source.seek(start)
            assert source.read(length) == content[start : start + length]


@given(st.binary(max_size=200), st.data())
def test_no_flipped_bit_is_read(tmp_path_factory: pytest.TempPathFactory, content: bytes, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped"
    sealed = bytearray(seal(content))
    place = data.draw(st.integers(0, len(sealed) - 1))
    sealed[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(sealed)
    with pytest.raises(FileDamaged, match=r"flipped: is damaged"):
        read_sealed(str(path), ARROW_END)


def test_a_damaged_block_spoils_no_other_one_and_is_never_parsed(tmp_path: Path) -> None:
    table = pa.table({"a": [random.Random(row).randbytes(300) for row in range(1000)]})
    sealed = bytearray(seal(encode_arrow_file(table, max_batch_rows=100)))
    sealed[2 * BLOCK_BYTES + 5] ^= 4
    path = tmp_path / "_moebeam" / "plan" / "s000000.arrow"
    path.parent.mkdir(parents=True)
    path.write_bytes(sealed)
    with open_sealed(str(path), ARROW_END) as source, open_arrow_file(source) as reader:
        assert reader.get_batch(0).num_rows == 100
        with pytest.raises(FileDamaged) as e:
            reader.read_all()
    assert f"bytes {2 * BLOCK_BYTES:,} to {3 * BLOCK_BYTES:,} do not have their checksum" in str(e.value)
    assert f"moebeam repair {tmp_path} says" in str(e.value)


def test_a_file_of_an_older_version_is_read_as_it_is(tmp_path: Path) -> None:
    table = pa.table({"a": [1, 2, 3]})
    path = tmp_path / "old"
    path.write_bytes(encode_arrow_file(table, max_batch_rows=2))
    with open_sealed(str(path), ARROW_END) as source, open_arrow_file(source) as reader:
        assert reader.read_all() == table
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileDamaged, match="its last bytes are"):
        open_sealed(str(path), ARROW_END)
