"""Prefix arithmetic: keys whose bytewise order is token order, shared lengths, tree size, and who shares what.

Free of torch and Beam, because the *plan* stage, the quote, the account and the engines all count with it.
The tenant is a virtual first token: nothing is ever shared across tenants.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from moebeam.schemas.records import TokenIds

NUM_TENANT_BYTES = 8
_NUM_TENANT_WORDS = NUM_TENANT_BYTES // 4


@dataclass(frozen=True, slots=True)
class Span:
    """Token positions `[start_token, end_token)` on the path of exactly the rows `[first_row, end_row)`."""

    start_token: int
    end_token: int
    first_row: int
    end_row: int

    @property
    def num_tokens(self) -> int:
        return self.end_token - self.start_token

    @property
    def num_rows(self) -> int:
        return self.end_row - self.first_row


def prefix_key(tenant: str, token_ids: TokenIds, *, are_words: bool = False) -> bytes:
    """The sort key of a request: 8 bytes for the tenant, then every token id as a big-endian uint32.

    Bytewise order of keys is order by tenant, then by tokens; a prefix sorts before what extends it.

    Args:
        tenant: zeros stand for the empty name, the first 8 bytes of its SHA-256 for any other.
        token_ids: int32, shape (num_tokens,).
        are_words: they stand for four bytes of text each (`remote_prompts.py`), whose first bit may be set.
    Raises:
        ValueError: a token id is negative.
    """
    if not are_words and token_ids.size and int(token_ids.min()) < 0:
        raise ValueError(f"token ids must not be negative, found {int(token_ids.min())}")
    return _tenant_bytes(tenant) + token_ids.astype(">u4").tobytes()


def token_ids_of(key: bytes) -> TokenIds:
    """The token ids of a key: int32 in native byte order, shape (num_tokens,)."""
    return np.frombuffer(key, dtype=">u4", offset=NUM_TENANT_BYTES).astype(np.int32)


def num_tokens_of(key: bytes) -> int:
    """How many tokens a key holds."""
    return (len(key) - NUM_TENANT_BYTES) // 4


def common_prefix_lengths(keys: Sequence[bytes]) -> npt.NDArray[np.int64]:
    """How many leading tokens each key shares with the key before it.

    Args:
        keys: of `prefix_key`, in any order; sorted, the lengths describe the prefix tree.
    Returns:
        int64, shape (num_keys,); the first is 0, and so is that of a key whose tenant differs from the one before.
    """
    lengths = np.zeros(len(keys), dtype=np.int64)
    if not keys:
        return lengths
    before = np.frombuffer(keys[0], dtype=np.uint32)
    for i in range(1, len(keys)):
        words = np.frombuffer(keys[i], dtype=np.uint32)
        lengths[i] = max(0, common_prefix_length(before, words) - _NUM_TENANT_WORDS)
        before = words
    return lengths


def common_prefix_length(left: npt.NDArray[np.generic], right: npt.NDArray[np.generic]) -> int:
    """How many leading elements two one-dimensional arrays share."""
    most = min(left.shape[0], right.shape[0])
    if most == 0:
        return 0
    is_different = left[:most] != right[:most]
    first = int(is_different.argmax())
    return first if is_different[first] else most


def num_tree_tokens(lengths: Sequence[int] | npt.NDArray[np.int64], lcps: npt.NDArray[np.int64]) -> int:
    """T: tokens in the prefix tree of sorted sequences, each shared prefix counted once.

    Args:
        lengths: tokens of each sequence, in sorted order.
        lcps: `common_prefix_lengths` of the same sequences.
    """
    return int(np.asarray(lengths, dtype=np.int64).sum()) - int(lcps.sum())


def max_hit_rate(lengths: Sequence[int] | npt.NDArray[np.int64], lcps: npt.NDArray[np.int64]) -> float:
    """h*: the share of prompt tokens that a perfect prefix cache serves, `1 - T / N`; 0 without tokens."""
    num_tokens = int(np.asarray(lengths, dtype=np.int64).sum())
    return 1.0 - num_tree_tokens(lengths, lcps) / num_tokens if num_tokens else 0.0


def shared_spans(lengths: Sequence[int] | npt.NDArray[np.int64], lcps: npt.NDArray[np.int64]) -> Iterator[Span]:
    """The nodes of the compressed prefix tree of sorted sequences, children before parents.

    The spans of a row partition its positions `[0, lengths[row])`, and the lengths of all spans add up to
    `num_tree_tokens`. Linear in the number of rows: an open span is cut where the next row leaves it.

    Args:
        lengths: tokens of each sequence, in sorted order.
        lcps: `common_prefix_lengths` of the same sequences.
    Raises:
        ValueError: a row shares more tokens than it or the row before it has, or the first row shares any.
    """
    num_before = 0
    row = 0
    open_spans: list[tuple[int, int, int]] = []  # (start_token, end_token, first_row), contiguous from token 0
    for row, (num_tokens, num_shared) in enumerate(zip(map(int, lengths), map(int, lcps), strict=True)):
        if not 0 <= num_shared <= min(num_before, num_tokens):
            raise ValueError(
                f"row {row} of {num_tokens} tokens cannot share {num_shared} with one of {num_before} before it"
            )
        while open_spans and open_spans[-1][1] > num_shared:
            start, end, first_row = open_spans.pop()
            if start < num_shared:
                open_spans.append((start, num_shared, first_row))
                start = num_shared
            yield Span(start, end, first_row, row)
        if num_tokens > num_shared:
            open_spans.append((num_shared, num_tokens, row))
        num_before = num_tokens
    for start, end, first_row in reversed(open_spans):
        yield Span(start, end, first_row, row + 1)


@lru_cache(maxsize=4096)
def _tenant_bytes(tenant: str) -> bytes:
    if not tenant:
        return bytes(NUM_TENANT_BYTES)
    return hashlib.sha256(tenant.encode("utf-8", "surrogatepass")).digest()[:NUM_TENANT_BYTES]
