"""Prefix arithmetic against a trie of dictionaries."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.model_runner.prefix_tree import (
    Span,
    common_prefix_lengths,
    max_hit_rate,
    num_tokens_of,
    num_tree_tokens,
    prefix_key,
    shared_spans,
    token_ids_of,
)

# Few token values and short rows, so that prefixes, duplicates and empty rows are common; ids that differ only in
# their high bytes, so that a wrong byte order shows.
token_rows = st.lists(st.sampled_from([0, 1, 255, 256, 65_536, 2**31 - 1]), max_size=7).map(tuple)
tenants = st.sampled_from(["", "a", "b"])
tenant_rows = st.lists(st.tuples(tenants, token_rows), max_size=12)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def sorted_keys(rows: list[tuple[str, tuple[int, ...]]]) -> list[bytes]:
    return sorted(prefix_key(tenant, ids(*tokens)) for tenant, tokens in rows)


def naive_spans(paths: list[tuple[object, ...]]) -> set[Span]:
    """The compressed tree by brute force: each position of each row belongs to the rows that share its whole path."""
    nodes: dict[tuple[int, int], list[int]] = {}
    for row, path in enumerate(paths):
        for position in range(1, len(path)):
            members = [i for i, other in enumerate(paths) if other[: position + 1] == path[: position + 1]]
            if members[0] == row:
                nodes.setdefault((members[0], members[-1] + 1), []).append(position - 1)
    return {Span(min(positions), max(positions) + 1, *rows) for rows, positions in nodes.items()}


def naive_trie_size(paths: list[tuple[object, ...]]) -> int:
    root: dict[object, dict] = {}
    for path in paths:
        node = root
        for token in path:
            node = node.setdefault(token, {})

    def size(node: dict[object, dict]) -> int:
        return sum(1 + size(child) for child in node.values())

    return size(root) - len(root)  # the tenant is no token


def paths_of(keys: list[bytes]) -> list[tuple[object, ...]]:
    return [(key[:8], *token_ids_of(key).tolist()) for key in keys]


@given(tenants, token_rows)
def test_token_ids_of_inverts_prefix_key(tenant: str, tokens: tuple[int, ...]) -> None:
    key = prefix_key(tenant, ids(*tokens))
    found = token_ids_of(key)
    assert found.tolist() == list(tokens)
    assert found.dtype == np.dtype("=i4")
    assert num_tokens_of(key) == len(tokens)


@given(token_rows, token_rows)
def test_byte_order_of_keys_is_token_order(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    assert (prefix_key("t", ids(*left)) < prefix_key("t", ids(*right))) == (left < right)


def test_tenant_of_a_key_is_zeros_when_empty_and_a_digest_otherwise() -> None:
    assert prefix_key("", ids(1)) == bytes(8) + b"\0\0\0\1"
    # First 8 bytes of SHA-256 of "abc", from FIPS 180-2's example.
    assert prefix_key("abc", ids())[:8] == bytes.fromhex("ba7816bf8f01cfea")


def test_negative_token_id_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        prefix_key("", ids(3, -1))


def test_key_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError):
        common_prefix_lengths([bytes(12), bytes(13)])


@given(tenant_rows)
def test_common_prefix_lengths_count_shared_tokens_of_one_tenant(rows: list[tuple[str, tuple[int, ...]]]) -> None:
    keys = [prefix_key(tenant, ids(*tokens)) for tenant, tokens in rows]
    expected = [0] * len(rows)
    for i in range(1, len(rows)):
        (tenant_before, before), (tenant, tokens) = rows[i - 1], rows[i]
        while (
            tenant_before == tenant
            and expected[i] < min(len(before), len(tokens))
            and before[expected[i]] == tokens[expected[i]]
        ):
            expected[i] += 1
    found = common_prefix_lengths(keys)
    assert found.dtype == np.int64
    assert found.tolist() == expected


@given(tenant_rows)
def test_tree_size_and_hit_rate_are_those_of_a_trie(rows: list[tuple[str, tuple[int, ...]]]) -> None:
    keys = sorted_keys(rows)
    lengths = [num_tokens_of(key) for key in keys]
    lcps = common_prefix_lengths(keys)
    num_nodes = naive_trie_size(paths_of(keys))
    assert num_tree_tokens(lengths, lcps) == num_nodes
    num_tokens = sum(lengths)
    assert max_hit_rate(lengths, lcps) == pytest.approx((num_tokens - num_nodes) / num_tokens if num_tokens else 0.0)


@given(tenant_rows)
def test_spans_are_the_nodes_of_the_compressed_tree(rows: list[tuple[str, tuple[int, ...]]]) -> None:
    keys = sorted_keys(rows)
    spans = list(shared_spans([num_tokens_of(key) for key in keys], common_prefix_lengths(keys)))
    assert len(spans) == len(set(spans))
    assert set(spans) == naive_spans(paths_of(keys))


@given(tenant_rows)
def test_spans_of_a_row_partition_its_tokens(rows: list[tuple[str, tuple[int, ...]]]) -> None:
    keys = sorted_keys(rows)
    lengths = [num_tokens_of(key) for key in keys]
    lcps = common_prefix_lengths(keys)
    covered: list[list[int]] = [[] for _ in keys]
    num_tokens = 0
    for span in shared_spans(lengths, lcps):
        num_tokens += span.num_tokens
        for row in range(span.first_row, span.first_row + span.num_rows):
            covered[row].extend(range(span.start_token, span.end_token))
    assert [sorted(positions) for positions in covered] == [list(range(length)) for length in lengths]
    assert num_tokens == num_tree_tokens(lengths, lcps)


@pytest.mark.parametrize(("lengths", "lcps"), [([3], [1]), ([2, 4], [0, 3]), ([4, 2], [0, 3]), ([2, 2], [0, -1])])
def test_impossible_shared_lengths_are_refused(lengths: list[int], lcps: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot share"):
        list(shared_spans(lengths, np.array(lcps)))
