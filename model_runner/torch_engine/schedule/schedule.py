"""Which tokens go through the model next: admission, steps, retirement. Free of torch.

    prompts --plan a window--> waiting --admit--> running --finish--> retired
                                  ^                  |
                                  `---- preempt -----'  its memory is freed, its answer so far is kept

    a step = the newest token of every running answer (decode) + chunks of prompts up to `max_step_rows` (prefill)

Prompts are admitted in token order, the depth-first order of their prefix tree, while the live root paths fit into
`max_cache_bytes`. If answers outgrow their reservations, the prompt admitted last is preempted and computed again
later. No prompt fails for lack of memory budget: one that exceeds it runs alone.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from moebeam.model_runner.torch_engine.schedule.prompt_tree import Node, build_prefix_tree
from moebeam.model_runner.torch_engine.schedule.running import Running
from moebeam.model_runner.torch_engine.schedule.sequences import Finished, Prompt, StopReason
from moebeam.model_runner.torch_engine.schedule.steps import Step, pack_step
from moebeam.schemas.errors import RowError

MAX_WINDOW_PROMPTS = 4096
"""Most prompts of a planning window; each waits in memory as token ids."""

MAX_WINDOW_TOKENS = 8_000_000
NUM_EXPECTED_TOKENS = 64
"""Answer tokens to reserve memory for while no answer has finished; later the mean of the finished ones is used."""


class CacheCosts(Protocol):
    """What a node costs in memory; the cache implements it."""

    @property
    def state_bytes(self) -> int:
        """Bytes of any node, whatever its length."""
        ...

    def span_bytes(self, start: int, end: int) -> int:
        """Bytes for the positions `[start, end)` of a path."""
        ...


class Schedule:
    """The waiting and running prompts of one run, and the policy that moves them.

    Attributes:
        live_bytes: reserved for live nodes.
        num_uncomputed_answer_tokens: tokens of finished answers that never went through the model.
    """

    def __init__(
        self,
        prompts: Iterable[Prompt],
        costs: CacheCosts,
        *,
        max_cache_bytes: int,
        max_running: int,
        max_step_rows: int,
        find_length_class: Callable[[int], int] | None = None,
    ) -> None:
        self._find_length_class = find_length_class
        self._source = iter(prompts)
        self.costs = costs
        self.max_cache_bytes = max_cache_bytes
        self.max_running = max_running
        self.max_step_rows = max_step_rows
        self._is_exhausted = False
        self._waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self._uncomputed_shared: list[Node] = []  # live ones that are not computed yet
        self._live_shared: dict[Node, None] = {}  # in order of admission
        self._released: list[Node] = []
        self._passed: list[Finished] = []
        self.num_planned = 0
        self.num_passed = 0
        self.num_passed_tokens = 0
        self._num_finished = 0
        self._num_finished_tokens = 0
        self.live_bytes = 0
        self.peak_bytes = 0
        self.num_tree_tokens = 0
        self.num_prompt_tokens = 0
        self.num_preemptions = 0
        self.num_uncomputed_answer_tokens = 0

    def has_work(self) -> bool:
        """Whether anything waits, runs, or may still come."""
        if not self.running and not self._waiting:
            self._plan_window()
        return bool(self.running or self._waiting)

    @property
    def num_running(self) -> int:
        return len(self.running)

    def live_spans(self) -> Iterator[tuple[int, int]]:
        """The positions `[start, end)` for which memory is reserved, of every live node."""
        seen: set[Node] = set()
        for running in self.running:
            yield running.node.start, running.reserved_end
            for node in running.node.path():
                if not node.is_private and node not in seen:
                    seen.add(node)
                    yield node.start, node.end

    def next_step(self) -> Step:
        """Admit prompts that fit and pack a step; call it only if `has_work()`."""
        self._grow_reservations()
        self._admit()
        chosen: list[tuple[Node, Running | None, int]] = []
        full_hits: list[Running] = []
        num_free = self.max_step_rows
        for running in self.running:
            if not self._is_ready(running.node):
                continue
            if running.is_decoding:
                num_rows = min(running.num_left, self.max_step_rows)
                chosen.append((running.node, running, num_rows))
                num_free -= num_rows
            elif running.num_left == 0:
                full_hits.append(running)
        num_prompt_rows = 0
        for node, running in self._list_prefills():
            if num_free <= 0:
                break
            num_left = running.num_left if running is not None else node.num_tokens - node.num_computed
            num_rows = min(num_left, num_free)
            chosen.append((node, running, num_rows))
            num_free -= num_rows
            num_prompt_rows += min(num_rows, node.num_tokens - node.num_computed)
        chosen.sort(key=lambda item: item[0].order)
        return pack_step(chosen, full_hits, num_prompt_rows)

    def mark_computed(self, step: Step) -> None:
        """Record that a step's tokens have gone through the model."""
        for span in step.spans:
            span.node.num_computed += span.num_rows
        self._uncomputed_shared = [node for node in self._uncomputed_shared if not node.is_computed]

    def append_token(self, running: Running, token_id: int, logprob: float | None) -> Finished | None:
        """Append a sampled token to its answer, and the tokens that its constraint then forces.

        Returns:
            The retired prompt if that ends the answer.
        """
        token_ids = [token_id]
        num_before = len(running.answer)
        constraint = running.prompt.constraint
        while token_ids:
            running.answer.append(token_ids.pop(0))
            if logprob is not None:
                running.logprobs.append(logprob)
            reason = self._find_stop_reason(running)
            if reason is not None:
                self.num_uncomputed_answer_tokens += len(running.answer) - num_before
                return self._finish(running, reason)
            if constraint is not None:
                try:
                    constraint.accept(running.answer[-1])
                except RowError as error:
                    return self.fail(running, error)
                if constraint.is_over:
                    self.num_uncomputed_answer_tokens += len(running.answer) - num_before
                    return self._finish(running, "stop")
                if not token_ids:
                    token_ids = constraint.find_forced_token_ids()
                    logprob = 0.0 if logprob is not None else None
        return None

    def fail(self, running: Running, error: RowError) -> Finished:
        """Retire a prompt with an error; its path's memory may hold NaN from now on."""
        for node in running.node.path():
            node.is_suspect = True
        return self._finish(running, "error", error)

    def preempt_all(self) -> list[Node]:
        """Preempt every running prompt and free all nodes, as after a failed step.

        Returns:
            The nodes whose memory is to be freed.
        """
        for running in reversed(self.running):
            self._waiting.appendleft(running)
        nodes = {node for running in self._waiting for node in running.node.path() if node.is_live}
        self.running = []
        for node in nodes:
            self._free_node(node)
        return self.take_released()

    def take_passed(self) -> list[Finished]:
        """The answered prompts that had their turn since the last call."""
        passed, self._passed = self._passed, []
        return passed

    def take_released(self) -> list[Node]:
        """The nodes that were freed since the last call."""
        released, self._released = self._released, []
        return released

    def _is_ready(self, node: Node) -> bool:
        return node.parent is None or node.parent.is_computed

    def _list_prefills(self) -> Iterator[tuple[Node, Running | None]]:
        """Nodes with prompt tokens left and a computed parent, depth-first; a private node with its prompt."""
        ready: list[tuple[Node, Running | None]] = [
            (node, None) for node in self._uncomputed_shared if self._is_ready(node)
        ]
        for running in self.running:
            if not running.is_decoding and running.num_left > 0 and self._is_ready(running.node):
                ready.append((running.node, running))
        yield from sorted(ready, key=lambda item: (item[0].order, item[0].is_private))

    def _plan_window(self) -> None:
        """Pull the next prompts and build their prefix tree."""
        prompts: list[Prompt] = []
        num_tokens = 0
        while not self._is_exhausted and len(prompts) < MAX_WINDOW_PROMPTS and num_tokens < MAX_WINDOW_TOKENS:
            prompt = next(self._source, None)
            if prompt is None:
                self._is_exhausted = True
            else:
                prompts.append(prompt)
                num_tokens += prompt.num_tokens
        tree = build_prefix_tree(prompts, self.num_planned, self._find_length_class)
        self.num_planned += len(prompts)
        self.num_tree_tokens += tree.num_tokens
        self.num_prompt_tokens += tree.num_prompt_tokens
        self._waiting.extend(Running(prompt, leaf) for prompt, leaf in zip(tree.prompts, tree.leaves, strict=True))

    def _admit(self) -> None:
        while len(self.running) < self.max_running:
            if not self._waiting:
                self._plan_window()
            if not self._waiting:
                return
            running = self._waiting[0]
            if running.prompt.is_answered:
                self._pass(self._waiting.popleft())
                continue
            new_nodes = [node for node in running.node.path() if not node.is_live]
            private = running.node
            num_own = private.num_tokens + len(running.answer)
            reserved_end = private.start + num_own + self._count_expected_tokens(running)
            num_bytes = sum(self._node_bytes(node) for node in new_nodes if not node.is_private)
            num_bytes += self.costs.state_bytes + self.costs.span_bytes(private.start, reserved_end)
            if self.live_bytes + num_bytes > self.max_cache_bytes:
                if self.running:
                    return
                self._free_idle_nodes(running)
            self._waiting.popleft()
            running.reserved_end = reserved_end
            if running.num_cached_tokens < 0:
                num_missed = sum(node.num_tokens for node in new_nodes if not node.is_claimed)
                running.num_cached_tokens = running.prompt.num_tokens - num_missed
                running.admitted_s = time.time()
            self.live_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            for node in reversed(new_nodes):
                node.is_live = True
                if not node.is_private:
                    self._uncomputed_shared.append(node)
                    self._live_shared[node] = None
            self.running.append(running)

    def _count_expected_tokens(self, running: Running) -> int:
        """Further answer tokens to reserve memory for."""
        expected = NUM_EXPECTED_TOKENS
        if self._num_finished:
            expected = 1 + self._num_finished_tokens * 5 // (self._num_finished * 4)
        return min(running.prompt.max_tokens - len(running.answer), max(16, expected))

    def _grow_reservations(self) -> None:
        """Extend the reservations of answers that outgrew theirs, preempting the prompts admitted last."""
        i = 0
        while i < len(self.running):
            running = self.running[i]
            needed_end = running.node.start + running.node.num_tokens + len(running.answer)
            if needed_end > running.reserved_end:
                most = running.node.start + running.node.num_tokens + running.prompt.max_tokens
                new_end = min(most, needed_end + NUM_EXPECTED_TOKENS)
                start = running.node.start
                num_bytes = self.costs.span_bytes(start, new_end) - self.costs.span_bytes(start, running.reserved_end)
                while self.live_bytes + num_bytes > self.max_cache_bytes and len(self.running) > i + 1:
                    self._preempt(self.running[-1])
                if self.live_bytes + num_bytes > self.max_cache_bytes:
                    self._free_idle_nodes()
                if self.live_bytes + num_bytes > self.max_cache_bytes and len(self.running) > 1:
                    self._preempt(running)
                    continue
                running.reserved_end = new_end
                self.live_bytes += num_bytes
                self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            i += 1

    def _preempt(self, running: Running) -> None:
        """Free a running prompt's memory; it keeps its answer and waits first in line."""
        self.running.remove(running)
        self._free_private(running)
        running.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting.appendleft(running)

    def _free_idle_nodes(self, next_one: Running | None = None) -> None:
        """Free shared nodes that neither a running prompt nor `next_one` needs; they will be computed again."""
        owners = self.running if next_one is None else [*self.running, next_one]
        needed = {node for owner in owners for node in owner.node.path()}
        for node in [node for node in self._live_shared if node not in needed]:
            self._free_node(node)

    def _find_stop_reason(self, running: Running) -> StopReason | None:
        prompt = running.prompt
        if running.answer[-1] in prompt.stop_token_ids:
            return "stop"
        if prompt.is_over is not None and prompt.is_over(running.answer):
            return "stop"
        return "length" if len(running.answer) >= prompt.max_tokens else None

    def _pass(self, answered: Running) -> None:
        """Give an answered prompt its turn: it claims its nodes."""
        for node in answered.node.path():
            node.is_claimed = True
        self._leave(answered)
        self.num_passed += 1
        self.num_passed_tokens += answered.prompt.num_tokens
        self._passed.append(Finished(answered.prompt.prompt_id, [], "stop"))

    def _leave(self, running: Running) -> None:
        """Free the shared nodes of a finished prompt that no other one needs."""
        parent = running.node.parent
        for node in parent.path() if parent is not None else ():
            node.num_prompts -= 1
            if node.num_prompts == 0 and node.is_live:
                self._free_node(node)

    def _finish(self, running: Running, reason: StopReason, error: RowError | None = None) -> Finished:
        self.running.remove(running)
        self._free_private(running)
        self._leave(running)
        self._num_finished += 1
        self._num_finished_tokens += len(running.answer)
        return Finished(
            prompt_id=running.prompt.prompt_id,
            token_ids=running.answer,
            finish_reason=reason,
            num_cached_tokens=max(0, running.num_cached_tokens),
            logprobs=running.logprobs,
            admitted_s=running.admitted_s,
            finished_s=time.time(),
            error=error,
        )

    def _free_private(self, running: Running) -> None:
        node = running.node
        if node.is_live:
            self.live_bytes -= self.costs.state_bytes + self.costs.span_bytes(node.start, running.reserved_end)
            self._release(node)

    def _free_node(self, node: Node) -> None:
        if node.is_private:
            owner = next(running for running in self._waiting if running.node is node)
            self._free_private(owner)
            return
        self.live_bytes -= self._node_bytes(node)
        self._release(node)

    def _release(self, node: Node) -> None:
        node.is_live = False
        node.num_computed = 0
        node.last_logits = None
        if not node.is_private:
            self._live_shared.pop(node, None)
            self._uncomputed_shared = [other for other in self._uncomputed_shared if other is not node]
        self._released.append(node)

    def _node_bytes(self, node: Node) -> int:
        return self.costs.state_bytes + self.costs.span_bytes(node.start, node.end)
