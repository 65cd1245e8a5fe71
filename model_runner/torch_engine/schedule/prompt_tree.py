"""The prefix tree of a planning window, as the engine walks it. Free of torch.

A node is a run of tokens that the same prompts share. Each prompt ends in a *private* node, which grows with its
answer and starts empty if the prompt ends exactly where a shared node does. `abc`, `abd` and `ab`:

    ab  (shared) --- c  (private)
     |-------------- d  (private)
     `-------------- .  (private, empty)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moebeam.model_runner.prefix_tree import common_prefix_lengths, num_tree_tokens, prefix_key
from moebeam.model_runner.torch_engine.schedule.sequences import Prompt
from moebeam.schemas.records import TokenIds


@dataclass(slots=True, eq=False)
class Node:
    """Tokens at the positions `[start, end)` of a path.

    Attributes:
        order: index of its first prompt in token order; sorts nodes depth-first, unless one is the other's ancestor.
        token_ids: int32, shape (end - start,); a private node's are only those of its prompt, not of the answer.
        num_prompts: unfinished prompts below it.
        num_computed: how many of its tokens, answer included, have gone through the model.
        is_live: memory is reserved for it.
        is_claimed: an answered prompt holds it, so that it counts as cached whether or not it is computed.
        wants_logits: a prompt ends on it, so the logits of its last token are kept in `last_logits`.
        memory: the cache's `NodeMemory`.
        is_suspect: an answer below it failed, so its memory may hold NaN.
        length_class: what its keys depend on of the length of the prompts below it; see `Rotary`.
    """

    parent: "Node | None"
    start: int
    token_ids: TokenIds
    order: int
    is_private: bool
    num_prompts: int = 0
    num_computed: int = 0
    is_live: bool = False
    is_claimed: bool = False
    wants_logits: bool = False
    last_logits: Any = None
    memory: Any = None
    is_suspect: bool = False
    length_class: int = 0

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def position(self) -> int:
        """Position of the next token to compute."""
        return self.start + self.num_computed

    @property
    def is_computed(self) -> bool:
        return self.num_computed >= self.num_tokens

    def path(self) -> Iterator["Node"]:
        """The node and its ancestors, itself first."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """A window's prompts and private nodes, in token order, and its size.

    Attributes:
        leaves: the private node of each prompt.
        num_tokens: T, tokens of the tree, every shared prefix counted once.
        num_prompt_tokens: N, tokens of all prompts.
    """

    prompts: list[Prompt] = field(default_factory=list[Prompt])
    leaves: list[Node] = field(default_factory=list[Node])
    num_tokens: int = 0
    num_prompt_tokens: int = 0


def build_prefix_tree(
    prompts: Sequence[Prompt], first_order: int = 0, find_length_class: Callable[[int], int] | None = None
) -> PrefixTree:
    """Build the prefix tree of a window: a sort, then linear in the number of tokens.

    Args:
        prompts: in any order; prompts of different tenants share nothing.
        first_order: `order` of the first prompt, so that windows sort one after another.
        find_length_class: of a prompt's number of tokens; prompts of different classes share nothing.
    """
    classes = [0] * len(prompts)
    owners = [prompt.tenant for prompt in prompts]
    if find_length_class is not None:
        classes = [find_length_class(prompt.num_tokens) for prompt in prompts]
        owners = [f"{length_class} {owner}" for length_class, owner in zip(classes, owners, strict=True)]
    keys = [prefix_key(owner, prompt.token_ids) for owner, prompt in zip(owners, prompts, strict=True)]
    by_token = sorted(range(len(prompts)), key=keys.__getitem__)
    ordered = [prompts[i] for i in by_token]
    lcps = common_prefix_lengths([keys[i] for i in by_token])
    lengths = np.array([prompt.num_tokens for prompt in ordered], dtype=np.int64)
    leaves: list[Node] = []
    path: list[Node] = []  # shared nodes from the root to the last prompt's private node, without it
    for row, prompt in enumerate(ordered):
        num_before = int(lcps[row])
        num_after = int(lcps[row + 1]) if row + 1 < len(ordered) else 0
        _return_to(path, num_before)
        order, length_class = first_order + row, classes[by_token[row]]
        num_shared = max(num_before, num_after)
        base = path[-1].end if path else 0
        if num_shared > base:
            shared = prompt.token_ids[base:num_shared]
            above = path[-1] if path else None
            path.append(Node(above, base, shared, order, is_private=False, length_class=length_class))
        parent = path[-1] if path else None
        rest = prompt.token_ids[num_shared:]
        leaf = Node(parent, num_shared, rest, order, is_private=True, length_class=length_class)
        if leaf.num_tokens == 0 and parent is not None:
            parent.wants_logits = True
        leaves.append(leaf)
    for leaf in leaves:
        for node in leaf.path():
            node.num_prompts += 1
    return PrefixTree(ordered, leaves, num_tree_tokens(lengths, lcps), int(lengths.sum()))


def _return_to(path: list[Node], num_shared: int) -> None:
    """Pop the path back to the `num_shared` tokens that the next prompt shares, splitting a node at that point."""
    while path and path[-1].end > num_shared:
        last = path.pop()
        if last.start < num_shared:
            _split(last, num_shared)
            path.append(last.parent if last.parent is not None else last)
            return


def _split(node: Node, position: int) -> None:
    """Move a node's tokens before `position` into a new parent."""
    num_upper = position - node.start
    upper_ids = node.token_ids[:num_upper]
    upper = Node(node.parent, node.start, upper_ids, node.order, is_private=False, length_class=node.length_class)
    node.parent = upper
    node.token_ids = node.token_ids[num_upper:]
    node.start = position
