"""Attention in parts against plain softmax attention over all keys."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moebeam.model_runner.torch_engine.layers.attention import MASKED, Merged, Partials, attend, attend_by_head

CPU = torch.device("cpu")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_bias(is_visible: Tensor) -> Tensor:
    return torch.where(is_visible, 0.0, MASKED)


def plain(query: Tensor, key: Tensor, value: Tensor, is_visible: Tensor, sinks: Tensor | None = None) -> Tensor:
    """(num_rows, num_heads, width), (num_keys, ...) and (num_rows, num_keys) to (num_rows, num_heads, value_width)."""
    scores = torch.einsum("rhw,kw->rhk", query.double(), key.double())
    scores.masked_fill_(~is_visible.unsqueeze(1), -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double().view(1, -1, 1).expand(scores.shape[0], -1, 1)), dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[0]]
    return (weights @ value.double()).float()


sizes = st.integers(1, 5)


@given(sizes, sizes, st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(0, 99), st.sampled_from([1, 30]))
def test_parts_of_keys_merge_to_plain_attention(
    num_rows: int, num_heads: int, parts: list[int], seed: int, scale: int
) -> None:
    # Scores up to some hundreds, where exponentials without a peak overflow.
    num_keys = sum(parts)
    query, key = normal(seed, num_rows, num_heads, 6) * scale, normal(seed + 1, num_keys, 6)
    value, is_visible = normal(seed + 2, num_keys, 4), normal(seed + 3, num_rows, num_keys) > 0
    is_visible[:, 0] = True  # a row that sees nothing has no attention
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed)).tolist()
    ends = torch.tensor(parts).cumsum(0).tolist()
    merged = Merged(num_rows, num_heads, 4, CPU)
    for i in order:
        keys = slice(ends[i] - parts[i], ends[i])
        merged.merge(
            0, num_rows, attend(query[None], key[None, keys], value[None, keys], make_bias(is_visible[None, :, keys]))
        )
    torch.testing.assert_close(merged.result(), plain(query, key, value, is_visible), atol=1e-5, rtol=1e-4)


@given(sizes, sizes, st.integers(0, 99))
def test_sink_counts_once_and_has_no_value(num_rows: int, num_heads: int, seed: int) -> None:
    query, key, value = normal(seed, num_rows, num_heads, 6), normal(seed + 1, 5, 6), normal(seed + 2, 5, 4)
    sinks = normal(seed + 3, num_heads) * 3
    merged = Merged.from_sinks(sinks, num_rows, 4)
    for keys in (slice(0, 2), slice(2, 5)):
        merged.merge(0, num_rows, attend(query[None], key[None, keys], value[None, keys], None))
    expected = plain(query, key, value, torch.ones(num_rows, 5, dtype=torch.bool), sinks)
    torch.testing.assert_close(merged.result(), expected, atol=1e-5, rtol=1e-4)


@given(st.integers(2, 6), sizes, st.integers(0, 99))
def test_some_rows_may_read_more_than_others(num_rows: int, num_heads: int, seed: int) -> None:
    query, key, value = normal(seed, num_rows, num_heads, 6), normal(seed + 1, 9, 6), normal(seed + 2, 9, 4)
    is_visible = torch.zeros(num_rows, 9, dtype=torch.bool)
    merged = Merged(num_rows, num_heads, 4, CPU)

    def read(rows: Tensor, keys: slice) -> Partials:
        is_visible[rows, keys] = True
        return attend(query[None, rows], key[None, keys], value[None, keys], None)

    some = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))[: num_rows // 2]
    merged.merge_at(some, read(some, slice(0, 3)))
    merged.merge(1, num_rows, read(torch.arange(1, num_rows), slice(3, 5)))
    everyone = torch.arange(num_rows)
    found = read(everyone, slice(5, 8))
    merged.merge(0, num_rows, found)
    # Of what rows 0 and 1 got, in another order, only the place of row 1 counts.
    merged.merge_at(torch.tensor([1]), read(torch.tensor([1]), slice(8, 9)), torch.tensor([0]))
    torch.testing.assert_close(merged.result(), plain(query, key, value, is_visible), atol=1e-5, rtol=1e-4)


@given(st.integers(1, 4), sizes, sizes, st.integers(0, 99))
def test_segments_of_one_product_do_not_mix(num_segments: int, num_rows: int, num_heads: int, seed: int) -> None:
    query = normal(seed, num_segments, num_rows, num_heads, 6)
    key, value = normal(seed + 1, num_segments, 5, 6), normal(seed + 2, num_segments, 5, 4)
    is_visible = normal(seed + 3, num_segments, num_rows, 5) > -0.5
    is_visible[..., 0] = True
    found = attend(query, key, value, make_bias(is_visible))
    out = (found.out / found.total.unsqueeze(-1)).view(num_segments, num_rows, num_heads, 4)
    for i in range(num_segments):
        expected = plain(query[i], key[i], value[i], is_visible[i])
        torch.testing.assert_close(out[i], expected, atol=1e-5, rtol=1e-4)


@given(sizes, sizes, st.integers(0, 99), st.booleans())
def test_heads_with_keys_of_their_own_read_them_alone(num_rows: int, num_heads: int, seed: int, has_bias: bool) -> None:
    query = normal(seed, num_rows, num_heads, 6)
    key, value = normal(seed + 1, num_heads, 7, 6), normal(seed + 2, num_heads, 7, 4)
    is_visible = normal(seed + 3, num_rows, 7) > -0.5 if has_bias else torch.ones(num_rows, 7, dtype=torch.bool)
    is_visible[:, 0] = True
    merged = Merged(num_rows, num_heads, 4, CPU)
    for keys in (slice(0, 4), slice(4, 7)):
        bias = make_bias(is_visible[:, keys]) if has_bias else None
        merged.merge(0, num_rows, attend_by_head(query, key[:, keys], value[:, keys], bias))
    for head in range(num_heads):
        expected = plain(query[:, head : head + 1], key[head], value[head], is_visible)
        torch.testing.assert_close(merged.result()[:, head : head + 1], expected, atol=1e-5, rtol=1e-4)


def test_row_that_sees_nothing_of_a_segment_is_as_if_it_had_not_read_it() -> None:
    query, key, value = normal(0, 2, 3, 6), normal(1, 5, 6), normal(2, 5, 4)
    hidden = attend(query[None], key[None], value[None] * 1e6, torch.full((1, 2, 5), MASKED))
    for is_first in (True, False):
        merged = Merged(2, 3, 4, CPU)
        seen = attend(query[None], key[None], value[None], None)
        for found in (hidden, seen) if is_first else (seen, hidden):
            merged.merge(0, 2, Partials(found.out.clone(), found.peak.clone(), found.total.clone()))
        expected = plain(query, key, value, torch.ones(2, 5, dtype=torch.bool))
        torch.testing.assert_close(merged.result(), expected, atol=1e-5, rtol=1e-4)
