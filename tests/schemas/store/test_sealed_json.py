"""Sealed records: plain JSON for everybody, and any change of a byte is noticed."""

import json

import pytest

from moebeam.schemas.store.sealed_json import seal_json, unseal_json

RECORD = {"shards": [{"shard": "s000000", "num_rows": 7}], "text": "žluť 🙂", "last": None}
INDENTED = json.dumps(RECORD, indent=2, ensure_ascii=False).encode()
COMPACT = json.dumps(RECORD, separators=(",", ":")).encode()


@pytest.mark.parametrize("content", [INDENTED, COMPACT, INDENTED + b"\n"])
def test_a_sealed_record_is_json_with_one_key_more(content: bytes) -> None:
    sealed = seal_json(content)
    assert {name: value for name, value in json.loads(sealed).items() if name != "sha256"} == RECORD
    assert json.loads(unseal_json(sealed)) == RECORD


def test_every_flip_of_a_bit_is_noticed() -> None:
    sealed = seal_json(COMPACT)
    for place in range(len(sealed)):
        for bit in range(8):
            flipped = bytearray(sealed)
            flipped[place] ^= 1 << bit
            with pytest.raises(ValueError):
                unseal_json(bytes(flipped))


@pytest.mark.parametrize(
    "content", [COMPACT, INDENTED, b"{}", json.dumps({"state_digest": "0" * 64}, indent=2).encode()]
)
def test_a_record_of_an_older_version_is_read_as_it_is(content: bytes) -> None:
    assert unseal_json(content) == content


def test_only_an_object_can_be_sealed() -> None:
    with pytest.raises(ValueError, match="expected a JSON object"):
        seal_json(b"[1, 2]")
