"""Prefix arithmetic: sort keys in token order, shared prefix lengths, tree size, and shared spans.

Free of torch and Beam, because *plan*, the quote, the account and the engines all use it. The tenant is a virtual
first token: nothing is shared across tenants.
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
    """Encode the sort key of a request: 8 bytes for the tenant, then every token id as a big-endian uint32.

    Bytewise order of keys is order by tenant, then by tokens; a prefix sorts before its extensions.

    Args:
        tenant: the empty name becomes zeros, any other the first 8 bytes of its SHA-256.
        token_ids: int32, shape (num_tokens,).
        are_words: each id is four bytes of text (`remote_prompts.py`), so its sign bit may be set.
    Raises:
        ValueError: a token id is negative.
    """
    if not are_words and token_ids.size and int(token_ids.min()) < 0:
        raise ValueError(f"token ids must not be negative, found {int(token_ids.min())}")
    return _tenant_bytes(tenant) + token_ids.astype(">u4").tobytes()


def token_ids_of(key: bytes) -> TokenIds:
    """Decode the token ids of a key: int32 in native byte order, shape (num_tokens,)."""
    return np.frombuffer(key, dtype=">u4", offset=NUM_TENANT_BYTES).astype(np.int32)


def num_tokens_of(key: bytes) -> int:
    """Count the tokens of a key."""
    return (len(key) - NUM_TENANT_BYTES) // 4


def common_prefix_lengths(keys: Sequence[bytes]) -> npt.NDArray[np.int64]:
    """Count the leading tokens that each key shares with the key before it.

    Args:
        keys: from `prefix_key`, in any order; for sorted keys, the lengths describe the prefix tree.
    Returns:
        int64, shape (num_keys,); 0 for the first key and wherever the tenant changes.
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
    """Count the leading elements that two one-dimensional arrays share."""
    most = min(left.shape[0], right.shape[0])
    if most == 0:
        return 0
    is_different = left[:most] != right[:most]
    first = int(is_different.argmax())
    return first if is_different[first] else most


def num_tree_tokens(lengths: Sequence[int] | npt.NDArray[np.int64], lcps: npt.NDArray[np.int64]) -> int:
    """T: tokens in the prefix tree of sorted sequences; each shared prefix counts once.

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

    The spans of a row partition its positions `[0, lengths[row])`, and all span lengths sum to `num_tree_tokens`.
    Linear in the number of rows: an open span is cut where the next row leaves it.

    Args:
        lengths: tokens of each sequence, in sorted order.
        lcps: `common_prefix_lengths` of the same sequences.
    Raises:
        ValueError: a row shares more tokens than it or its predecessor has, or the first row shares any.
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
