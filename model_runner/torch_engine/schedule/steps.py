"""What goes through the model together, packed into rows. Free of torch.

Spans lie side by side in depth-first order of their nodes, so that the rows below a shared node are neighbours. Here A
and C decode, B is in prefill, and all of S is computed:

    tree                     row       0    1    2    3    4    5    6
    S                        span     [A]  [B    B    B    B    B]  [C]
    |-- A  1 token left      logits    *                        *    *
    |-- B  5 tokens left
    `-- C  1 token left      had the step less room, B's chunk would be cut and give no logits yet
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from moebeam.model_runner.torch_engine.schedule.prompt_tree import Node
from moebeam.model_runner.torch_engine.schedule.running import Running
from moebeam.schemas.records import TokenIds


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Consecutive tokens of one node, from `position` on, in the rows `[first_row, end_row)` of a step.

    `running` is the prompt whose private node it is, None for a shared node.
    """

    node: Node
    position: int
    first_row: int
    num_rows: int
    running: Running | None

    @property
    def end_row(self) -> int:
        return self.first_row + self.num_rows


@dataclass(frozen=True, slots=True)
class Step:
    """One pass through the model.

    Attributes:
        spans: in depth-first order; no node is an ancestor of another.
        token_ids: int32, shape (num_rows,).
        positions: int64, shape (num_rows,).
        logit_rows: rows whose logits are needed, ascending.
        logit_owners: for each of them the prompt that samples from it, or the shared node that keeps its logits for
            prompts that end there.
        full_hits: prompts that end on a computed shared node: no row of theirs, they sample from its kept logits.
        num_prompt_rows: rows of prompt tokens; the other rows are tokens of answers.
    """

    spans: list[Span]
    token_ids: TokenIds
    positions: npt.NDArray[np.int64]
    logit_rows: list[int]
    logit_owners: list[Running | Node]
    full_hits: list[Running]
    num_prompt_rows: int

    @property
    def num_rows(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def sampled(self) -> list[Running]:
        """The prompts that sample a token after this step; built anew at each call."""
        return [owner for owner in self.logit_owners if isinstance(owner, Running)] + self.full_hits

    def list_lengths(self) -> npt.NDArray[np.int64]:
        """Of the sequence at each row: that of its prompt as far as it counts, then up to the row; (num_rows,)."""
        classes = [np.full(span.num_rows, span.node.length_class, dtype=np.int64) for span in self.spans]
        return np.maximum(self.positions + 1, np.concatenate(classes))

    def logit_spans(self) -> list[Span]:
        """`logit_rows` as spans of one row each; `first_row` counts among them."""
        rows = set(self.logit_rows)
        ends = [span for span in self.spans if span.end_row - 1 in rows]
        return [
            Span(span.node, span.position + span.num_rows - 1, row, 1, span.running) for row, span in enumerate(ends)
        ]


def cut_step(step: Step, max_rows: int) -> list[Step]:
    """Cut a step into parts of at most so many rows, to be computed one after another; they have no `full_hits`.

    No node of a step is another's ancestor, so that a part needs nothing of the others but what earlier pieces of
    its spans wrote.
    """
    if step.num_rows <= max_rows:
        return [replace(step, full_hits=[])]
    return [_cut_part(step, first, min(first + max_rows, step.num_rows)) for first in range(0, step.num_rows, max_rows)]


def _cut_part(step: Step, first: int, end: int) -> Step:
    spans: list[Span] = []
    num_prompt_rows = 0
    for span in step.spans:
        begin, stop = max(span.first_row, first), min(span.end_row, end)
        if begin < stop:
            position = span.position + begin - span.first_row
            spans.append(Span(span.node, position, begin - first, stop - begin, span.running))
            num_prompt_rows += max(0, min(stop - begin, span.node.end - position))
    logits = [
        (row - first, owner)
        for row, owner in zip(step.logit_rows, step.logit_owners, strict=True)
        if first <= row < end
    ]
    return Step(
        spans,
        step.token_ids[first:end],
        step.positions[first:end],
        [row for row, _ in logits],
        [owner for _, owner in logits],
        [],
        num_prompt_rows,
    )


def pack_step(
    chosen: Sequence[tuple[Node, Running | None, int]], full_hits: list[Running], num_prompt_rows: int
) -> Step:
    """Lay the next tokens of nodes side by side.

    Args:
        chosen: in depth-first order: a node, the prompt whose private node it is, and how many tokens.
    """
    spans: list[Span] = []
    token_ids: list[TokenIds] = []
    positions: list[npt.NDArray[np.int64]] = []
    logit_rows: list[int] = []
    logit_owners: list[Running | Node] = []
    num_rows = 0
    for node, running, num in chosen:
        span = Span(node, node.position, num_rows, num, running)
        if running is not None:
            token_ids.append(running.next_tokens(num))
            owner = running if num == running.num_left else None
        else:
            token_ids.append(node.token_ids[node.num_computed : node.num_computed + num])
            owner = node if node.wants_logits and node.num_computed + num == node.num_tokens else None
        positions.append(np.arange(span.position, span.position + num, dtype=np.int64))
        num_rows += num
        spans.append(span)
        if owner is not None:
            logit_rows.append(num_rows - 1)
            logit_owners.append(owner)
    empty = np.zeros(0, dtype=np.int32)
    return Step(
        spans,
        np.concatenate(token_ids) if token_ids else empty,
        np.concatenate(positions) if positions else empty.astype(np.int64),
        logit_rows,
        logit_owners,
        full_hits,
        num_prompt_rows,
    )
