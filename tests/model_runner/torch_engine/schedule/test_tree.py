"""The prefix tree of a window against plain comparisons of token lists."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moebeam.model_runner.torch_engine.schedule.prompt_tree import Node, build_prefix_tree
from moebeam.model_runner.torch_engine.schedule.sequences import Prompt
from moebeam.schemas.records import Sampling

# Few tokens and short prompts, so that prefixes are shared at every depth, and prompts are often equal.
token_lists = st.lists(st.integers(0, 2), min_size=1, max_size=8)
batches = st.lists(st.tuples(st.sampled_from(["", "a"]), token_lists), max_size=14)

Batch = list[tuple[str, list[int]]]


def make_prompts(batch: Batch) -> list[Prompt]:
    return [
        Prompt(str(i), np.array(token_ids, dtype=np.int32), 1, Sampling(1), tenant=tenant)
        for i, (tenant, token_ids) in enumerate(batch)
    ]


def list_nodes(leaves: list[Node]) -> set[Node]:
    return {node for leaf in leaves for node in leaf.path()}


@given(batches)
def test_every_path_spells_its_prompt(batch: Batch) -> None:
    prompts = make_prompts(batch)
    tree = build_prefix_tree(prompts)
    assert sorted(prompt.prompt_id for prompt in tree.prompts) == sorted(prompt.prompt_id for prompt in prompts)
    for prompt, leaf in zip(tree.prompts, tree.leaves, strict=True):
        path = list(leaf.path())[::-1]
        spelled = [token for node in path for token in node.token_ids.tolist()]
        assert spelled == prompt.token_ids.tolist()
        assert [node.start for node in path] == [0, *(node.end for node in path[:-1])]
        assert [node.is_private for node in path] == [False] * (len(path) - 1) + [True]
        assert all(node.num_tokens > 0 for node in path[:-1])


@given(batches)
def test_tree_holds_each_distinct_prefix_of_a_tenant_once(batch: Batch) -> None:
    tree = build_prefix_tree(make_prompts(batch))
    prefixes = {(tenant, tuple(token_ids[: i + 1])) for tenant, token_ids in batch for i in range(len(token_ids))}
    # Equal prompts end on one shared node.
    assert tree.num_tokens == len(prefixes) == sum(node.num_tokens for node in list_nodes(tree.leaves))
    assert tree.num_prompt_tokens == sum(len(token_ids) for _, token_ids in batch)


@given(batches)
def test_shared_nodes_have_more_than_one_prompt_and_private_ones_their_own(batch: Batch) -> None:
    tree = build_prefix_tree(make_prompts(batch))
    assert len(set(tree.leaves)) == len(batch)
    for node in list_nodes(tree.leaves):
        below = sum(node in leaf.path() for leaf in tree.leaves)
        assert node.num_prompts == below
        assert below == 1 if node.is_private else below > 1
        assert node.is_private == (node in tree.leaves)


@given(batches)
def test_logits_are_kept_where_a_prompt_ends_on_a_shared_node(batch: Batch) -> None:
    tree = build_prefix_tree(make_prompts(batch))
    ends = {leaf.parent for leaf in tree.leaves if leaf.num_tokens == 0}
    assert {node for node in list_nodes(tree.leaves) if node.wants_logits} == ends


@given(batches, st.integers(0, 100))
def test_orders_are_depth_first_in_token_order(batch: Batch, first_order: int) -> None:
    tree = build_prefix_tree(make_prompts(batch), first_order)
    assert [leaf.order for leaf in tree.leaves] == list(range(first_order, first_order + len(batch)))
    for node in list_nodes(tree.leaves):
        below = [leaf.order for leaf in tree.leaves if node in leaf.path()]
        assert node.order == below[0]
        assert below == list(range(below[0], below[0] + len(below)))
    by_tenant: dict[str, list[list[int]]] = {}
    for prompt in tree.prompts:
        by_tenant.setdefault(prompt.tenant, []).append(prompt.token_ids.tolist())
    assert all(prompts == sorted(prompts) for prompts in by_tenant.values())


def test_prompts_of_different_tenants_share_nothing() -> None:
    tree = build_prefix_tree(make_prompts([("a", [1, 2, 3]), ("b", [1, 2, 3])]))
    assert tree.num_tokens == 6
    assert all(leaf.parent is None for leaf in tree.leaves)


def test_node_is_split_where_a_later_prompt_leaves_it() -> None:
    tree = build_prefix_tree(make_prompts([("", [1, 2, 3, 4]), ("", [1, 2, 3, 5]), ("", [1, 7])]))
    first, second, third = tree.leaves
    assert first.parent is second.parent
    assert first.parent is not None
    assert first.parent.token_ids.tolist() == [2, 3]
    assert third.parent is first.parent.parent
    assert third.parent is not None
    assert (third.parent.token_ids.tolist(), third.token_ids.tolist()) == ([1], [7])
    assert (third.parent.num_prompts, first.parent.num_prompts) == (3, 2)


def test_empty_window_has_no_tree() -> None:
    tree = build_prefix_tree([])
    assert (tree.prompts, tree.leaves, tree.num_tokens, tree.num_prompt_tokens) == ([], [], 0, 0)
