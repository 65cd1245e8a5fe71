"""Made inputs for `benchmarks.sharding`: who shares what with whom, without the tokens themselves.

A prompt is a path of nodes of the prefix tree, each of some tokens. Two prompts share whole nodes or nothing, so the
ids of the nodes stand for the tokens: in the order of these ids prompts stand as in token order, and what two of them
share is the sum of the nodes that they have in common. That keeps 200,000 prompts of some thousand tokens small.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.int64]

NO_NODE = -1


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts in the order of their arrival.

    Attributes:
        paths: ids of the nodes from the root on, `NO_NODE` after the last; shape (num_rows, max_depth).
        node_tokens: tokens of each node; shape (num_nodes,).
        max_tokens: most output tokens asked for, which a plan knows; shape (num_rows,).
        num_output_tokens: what the answers take in the end, which it does not know; shape (num_rows,).
    """

    name: str
    title: str
    paths: Ints
    node_tokens: Ints
    max_tokens: Ints
    num_output_tokens: Ints

    @property
    def num_rows(self) -> int:
        return self.paths.shape[0]

    @property
    def path_tokens(self) -> Ints:
        """Tokens of each node of each path, 0 after the last; shape (num_rows, max_depth)."""
        return np.where(self.paths == NO_NODE, 0, self.node_tokens[self.paths])

    @property
    def lengths(self) -> Ints:
        """Tokens of each prompt; shape (num_rows,)."""
        return self.path_tokens.sum(axis=1)


class TreeBuilder:
    """Hands out node ids level by level; a row leaves at the level where its choice is negative."""

    def __init__(self, num_rows: int, draw: np.random.Generator) -> None:
        self._num_rows = num_rows
        self._draw = draw
        self._levels: list[Ints] = []
        self._tokens: list[Ints] = []
        self._num_nodes = 0

    def level(self, choices: Ints, num_tokens: tuple[int, int]) -> None:
        """Below the level before: rows with the same path and the same choice share a node of so many tokens."""
        before = self._levels[-1] if self._levels else np.zeros(self._num_rows, dtype=np.int64)
        goes_on = (choices >= 0) & (before != NO_NODE)
        pairs = np.stack([before[goes_on], choices[goes_on]], axis=1)
        found, places = np.unique(pairs, axis=0, return_inverse=True)
        nodes = np.full(self._num_rows, NO_NODE, dtype=np.int64)
        nodes[goes_on] = places.reshape(-1) + self._num_nodes
        self._add(nodes, found.shape[0], num_tokens)

    def build(
        self, name: str, title: str, *, tail_tokens: tuple[int, int], max_tokens: Ints, order: Ints | None = None
    ) -> Workload:
        """Give each row a tail of its own, and let them arrive in an order, at random unless given."""
        self._add(np.arange(self._num_rows, dtype=np.int64) + self._num_nodes, self._num_rows, tail_tokens)
        paths = np.stack(self._levels, axis=1)
        # Rows that left early have gaps before their tail: close them.
        order_in_row = np.argsort(paths == NO_NODE, axis=1, kind="stable")
        paths = np.take_along_axis(paths, order_in_row, axis=1)
        arrival = self._draw.permutation(self._num_rows) if order is None else order
        outputs = self._draw.integers(1, max_tokens + 1)
        return Workload(
            name, title, paths[arrival], np.concatenate(self._tokens), max_tokens[arrival], outputs[arrival]
        )

    def _add(self, nodes: Ints, num_nodes: int, num_tokens: tuple[int, int]) -> None:
        self._levels.append(nodes)
        self._tokens.append(self._draw.integers(num_tokens[0], num_tokens[1] + 1, num_nodes))
        self._num_nodes += num_nodes


def chat_templates(num_rows: int, draw: np.random.Generator) -> Workload:
    """Twelve long system prompts, some far more in use; how long answers are depends on the system prompt."""
    tree = TreeBuilder(num_rows, draw)
    system = zipf(num_rows, 12, 1.1, draw)
    tree.level(system, (1500, 6000))
    long_or_short = np.array([32, 512, 128])[system % 3]
    return tree.build(
        "chat_templates", "12 long system prompts, short questions", tail_tokens=(40, 400), max_tokens=long_or_short
    )


def deep_trees(num_rows: int, draw: np.random.Generator) -> Workload:
    """Agents that branch at every turn, up to eight turns deep; one prompt in six stops at each turn."""
    tree = TreeBuilder(num_rows, draw)
    last_turn = np.minimum(draw.geometric(1 / 6, num_rows), 8)
    for turn in range(8):
        choices = draw.geometric(0.35, num_rows)
        tree.level(np.where(turn < last_turn, choices, NO_NODE), (100, 600))
    return tree.build(
        "deep_trees",
        "agents that branch at each of up to 8 turns",
        tail_tokens=(20, 200),
        max_tokens=draw.choice([32, 128, 512], num_rows),
    )


def zipf_documents(num_rows: int, draw: np.random.Generator) -> Workload:
    """One system prompt, then a document; some documents are asked about thousands of times, most once or twice."""
    tree = TreeBuilder(num_rows, draw)
    tree.level(np.zeros(num_rows, dtype=np.int64), (300, 300))
    tree.level(zipf(num_rows, max(1, num_rows // 5), 1.05, draw), (1000, 8000))
    return tree.build(
        "zipf_documents",
        "documents behind one system prompt, Zipf-shared",
        tail_tokens=(20, 80),
        max_tokens=draw.choice([32, 128, 512], num_rows),
    )


def grouped_documents(num_rows: int, draw: np.random.Generator) -> Workload:
    """Ten questions a document, which stand side by side in the input: the kindest order of arrival there is."""
    tree = TreeBuilder(num_rows, draw)
    tree.level(np.zeros(num_rows, dtype=np.int64), (300, 300))
    tree.level(np.arange(num_rows, dtype=np.int64) // 10, (2000, 4000))
    return tree.build(
        "grouped_documents",
        "10 questions a document, side by side in the input",
        tail_tokens=(20, 80),
        max_tokens=draw.choice([32, 128, 512], num_rows),
        order=np.arange(num_rows, dtype=np.int64),
    )


def hot_subtree(num_rows: int, draw: np.random.Generator) -> Workload:
    """Nine of ten prompts behind one long root, which then divides into many small parts; the rest share nothing."""
    tree = TreeBuilder(num_rows, draw)
    is_hot = draw.random(num_rows) < 0.9
    tree.level(np.where(is_hot, 0, NO_NODE), (6000, 6000))
    tree.level(np.where(is_hot, zipf(num_rows, 200, 0.8, draw), NO_NODE), (200, 800))
    return tree.build(
        "hot_subtree",
        "9 of 10 prompts behind one root of 6,000 tokens",
        tail_tokens=(50, 500),
        max_tokens=draw.choice([32, 128, 512], num_rows),
    )


def no_sharing(num_rows: int, draw: np.random.Generator) -> Workload:
    """Prompts that have nothing in common; lengths differ widely."""
    tree = TreeBuilder(num_rows, draw)
    return tree.build(
        "no_sharing",
        "nothing in common",
        tail_tokens=(100, 3000),
        max_tokens=draw.choice([32, 128, 512], num_rows),
    )


WORKLOADS: Mapping[str, Callable[[int, np.random.Generator], Workload]] = {
    make.__name__: make
    for make in (chat_templates, deep_trees, zipf_documents, grouped_documents, hot_subtree, no_sharing)
}


def zipf(num_rows: int, num_choices: int, exponent: float, draw: np.random.Generator) -> Ints:
    """Choices whose k-th is taken in proportion to `k ** -exponent`, their numbers shuffled; shape (num_rows,)."""
    shares = np.arange(1, num_choices + 1, dtype=np.float64) ** -exponent
    ranks = np.searchsorted(np.cumsum(shares) / shares.sum(), draw.random(num_rows))
    return draw.permutation(num_choices)[np.minimum(ranks, num_choices - 1)].astype(np.int64)
