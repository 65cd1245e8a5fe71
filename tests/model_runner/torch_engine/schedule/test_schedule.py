"""The schedule, driven as the engine drives it, by a model that knows a token only from what was kept on its path."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moebeam.model_runner.torch_engine.schedule import schedule as schedule_module
from moebeam.model_runner.torch_engine.schedule.prompt_tree import Node
from moebeam.model_runner.torch_engine.schedule.running import Running
from moebeam.model_runner.torch_engine.schedule.schedule import Schedule
from moebeam.model_runner.torch_engine.schedule.sequences import Finished, Prompt
from moebeam.model_runner.torch_engine.schedule.steps import Step
from moebeam.schemas.errors import EngineFailed
from moebeam.schemas.records import Sampling

END_TOKEN = 9
SPACIOUS = 1 << 40


@dataclass(frozen=True, slots=True)
class TokenCosts:
    """A byte a token; entries of `rate` tokens, as of compressed layers, where that is more than 1."""

    state_bytes: int = 0
    rate: int = 1

    def span_bytes(self, start: int, end: int) -> int:
        return end // self.rate - start // self.rate


@dataclass(frozen=True, slots=True)
class Options:
    """How a run is scheduled."""

    costs: TokenCosts = TokenCosts()
    max_cache_bytes: int = SPACIOUS
    max_running: int = 128
    max_step_rows: int = 2048


def next_token(path: Sequence[int]) -> int:
    """What the model says after a path: 0 to 9, by a hash of all of it."""
    return zlib.crc32(bytes(path)) % 10


def answer_alone(prompt: Prompt) -> list[int]:
    """What the model answers to a prompt alone."""
    path = prompt.token_ids.tolist()
    answer: list[int] = []
    while len(answer) < prompt.max_tokens:
        answer.append(next_token(path + answer))
        if answer[-1] in prompt.stop_token_ids or (prompt.is_over is not None and prompt.is_over(answer)):
            break
    return answer


@dataclass
class FakeModel:
    """Keeps tokens of live nodes, checks every step, and draws tokens from what is kept.

    Attributes:
        breaks: tells of a step that it fails.
    """

    schedule: Schedule
    breaks: Callable[[Step], bool] = lambda step: False
    kept: dict[Node, list[int]] = field(default_factory=dict)
    num_computed_prompt_tokens: int = 0
    num_steps: int = 0

    def run(self) -> Iterator[Finished]:
        while self.schedule.has_work():
            yield from self._step()
            for node in self.schedule.take_released():
                self.kept.pop(node, None)
            self._check_bytes()

    def _step(self) -> list[Finished]:
        schedule = self.schedule
        step = schedule.next_step()
        self.num_steps += 1
        for node in schedule.take_released():
            self.kept.pop(node, None)
        assert 0 < schedule.num_running <= schedule.max_running
        self._check_step(step)
        if self.breaks(step):
            return self._recover()
        for span in step.spans:
            self._extend(span.node, step.token_ids[span.first_row : span.end_row].tolist())
        if step.num_rows:
            schedule.mark_computed(step)
        self.num_computed_prompt_tokens += step.num_prompt_rows
        for who in step.logit_owners:
            if isinstance(who, Node):
                who.last_logits = next_token(self._path(who))
        drawn = [(who, next_token(self._path(who.node))) for who in step.logit_owners if isinstance(who, Running)]
        for running in step.full_hits:
            assert running.node.parent is not None
            drawn.append((running, running.node.parent.last_logits))
        finished = [schedule.append_token(running, token, None) for running, token in drawn]
        return [one for one in finished if one is not None]

    def _recover(self) -> list[Finished]:
        schedule = self.schedule
        finished: list[Finished] = []
        if schedule.num_running == 1:
            finished.append(schedule.fail(schedule.running[0], EngineFailed("broken")))
        schedule.max_running = max(1, schedule.num_running // 2)
        schedule.preempt_all()
        self.kept.clear()
        assert schedule.live_bytes == 0
        return finished

    def _path(self, node: Node) -> list[int]:
        return [token for ancestor in list(node.path())[::-1] for token in self.kept.get(ancestor, [])]

    def _extend(self, node: Node, token_ids: list[int]) -> None:
        assert all(ancestor.is_computed for ancestor in list(node.path())[1:])
        kept = self.kept.setdefault(node, [])
        assert len(kept) == node.num_computed
        kept += token_ids

    def _check_step(self, step: Step) -> None:
        assert step.num_rows or step.full_hits
        assert step.num_prompt_rows <= self.schedule.max_step_rows
        ends = [0, *(span.end_row for span in step.spans)]
        assert [span.first_row for span in step.spans] == ends[:-1]
        assert ends[-1] == step.num_rows == len(step.positions)
        orders = [span.node.order for span in step.spans]
        assert orders == sorted(set(orders))
        nodes = {span.node for span in step.spans}
        for span in step.spans:
            assert not nodes.intersection(list(span.node.path())[1:])
            assert span.position == span.node.position
            rows = slice(span.first_row, span.end_row)
            assert step.positions[rows].tolist() == list(range(span.position, span.position + span.num_rows))
            assert span.num_rows > 0
        # Whoever draws, does so from the last row of its span.
        last_rows = {span.running or span.node: span.end_row - 1 for span in step.spans}
        assert step.logit_rows == [last_rows[who] for who in step.logit_owners]
        assert step.logit_rows == sorted(step.logit_rows)
        drawn = step.logit_spans()
        assert [span.position for span in drawn] == step.positions[step.logit_rows].tolist()
        assert [(span.first_row, span.num_rows) for span in drawn] == [(row, 1) for row in range(len(drawn))]

    def _check_bytes(self) -> None:
        """Live bytes are those of running prompts and of nodes that are still waited for."""
        schedule, costs = self.schedule, self.schedule.costs
        spans = list(schedule.live_spans())
        needed = sum(costs.state_bytes + costs.span_bytes(*span) for span in spans)
        assert needed <= schedule.live_bytes <= schedule.peak_bytes


def make_prompt(prompt_id: object, token_ids: Sequence[int], max_tokens: int = 4, **values: object) -> Prompt:
    return Prompt(str(prompt_id), np.array(token_ids, dtype=np.int32), max_tokens, Sampling(max_tokens), **values)


def make_schedule(prompts: Iterable[Prompt], options: Options = Options()) -> Schedule:
    return Schedule(
        prompts,
        options.costs,
        max_cache_bytes=options.max_cache_bytes,
        max_running=options.max_running,
        max_step_rows=options.max_step_rows,
    )


def run_all(
    prompts: Sequence[Prompt], options: Options = Options(), breaks: Callable[[Step], bool] = lambda step: False
) -> tuple[dict[str, Finished], FakeModel]:
    """What becomes of each prompt, exactly one result each, and the model after the run."""
    model = FakeModel(make_schedule(prompts, options), breaks)
    found: dict[str, Finished] = {}
    for finished in model.run():
        assert finished.prompt_id not in found
        found[finished.prompt_id] = finished
    assert set(found) == {prompt.prompt_id for prompt in prompts}
    assert not model.schedule.has_work()
    return found, model


def path_bytes(prompt: Prompt, options: Options) -> int:
    """Most bytes that a prompt alone can need: up to a node for each of its tokens, and the private one."""
    num_nodes = prompt.num_tokens + 1
    return num_nodes * options.costs.state_bytes + options.costs.span_bytes(0, prompt.num_tokens + prompt.max_tokens)


token_lists = st.lists(st.integers(0, 2), min_size=1, max_size=12)
# Answers longer than what is set aside at first make prompts preempt each other.
prompt_lists = st.lists(st.tuples(token_lists, st.integers(1, 150) | st.integers(1, 6)), max_size=9).map(
    lambda batch: [make_prompt(i, *item) for i, item in enumerate(batch)]
)
options = st.builds(
    Options,
    costs=st.builds(TokenCosts, state_bytes=st.sampled_from([0, 7]), rate=st.sampled_from([1, 4])),
    max_cache_bytes=st.just(SPACIOUS) | st.integers(1, 500),
    max_running=st.integers(1, 10),
    max_step_rows=st.sampled_from([2048, 1, 3, 10]),
)


@given(prompt_lists, options)
def test_every_prompt_gets_the_answer_that_it_gets_alone(prompts: list[Prompt], options: Options) -> None:
    found, model = run_all(prompts, options)
    for prompt in prompts:
        finished = found[prompt.prompt_id]
        assert finished.error is None
        assert (finished.token_ids, finished.finish_reason) == (answer_alone(prompt), "length")
    assert model.schedule.live_bytes == 0
    assert not model.kept


@given(prompt_lists, options)
def test_prompts_pay_for_what_they_found_missing(prompts: list[Prompt], options: Options) -> None:
    found, model = run_all(prompts, options)
    num_paid = sum(prompt.num_tokens - found[prompt.prompt_id].num_cached_tokens for prompt in prompts)
    # More than the tree where a shared node was given back before its next prompt came.
    assert model.schedule.num_tree_tokens <= num_paid <= model.num_computed_prompt_tokens
    assert all(0 <= found[prompt.prompt_id].num_cached_tokens <= prompt.num_tokens for prompt in prompts)
    assert model.schedule.num_prompt_tokens == sum(prompt.num_tokens for prompt in prompts)


@given(prompt_lists, st.integers(1, 10), st.sampled_from([2048, 1, 3]))
def test_with_memory_to_spare_each_token_of_the_tree_is_computed_once(
    prompts: list[Prompt], max_running: int, max_step_rows: int
) -> None:
    found, model = run_all(prompts, Options(max_running=max_running, max_step_rows=max_step_rows))
    num_paid = sum(prompt.num_tokens - found[prompt.prompt_id].num_cached_tokens for prompt in prompts)
    assert num_paid == model.schedule.num_tree_tokens
    assert model.num_computed_prompt_tokens == model.schedule.num_tree_tokens
    assert model.schedule.num_preemptions == 0


@given(prompt_lists, options, st.integers(0, 40))
# The second prompt leaves a shared node behind when it is preempted, and the first one grows beside it.
@example([make_prompt(0, [0] * 6, 150), make_prompt(1, [1] * 6, 150), make_prompt(2, [1] * 5 + [2], 150)], Options(), 0)
def test_memory_stays_within_a_budget_that_holds_each_prompt_alone(
    prompts: list[Prompt], options: Options, num_spare_bytes: int
) -> None:
    budget = max((path_bytes(prompt, options) for prompt in prompts), default=0) + num_spare_bytes
    _, model = run_all(prompts, replace(options, max_cache_bytes=budget))
    assert model.schedule.peak_bytes <= budget


def test_node_of_prompts_that_only_wait_makes_room_for_those_that_run() -> None:
    # The second prompt is over, and its node waits for the third, which does not fit beside the first as that grows.
    prompts = [make_prompt(0, [0] * 6, 150), make_prompt(1, [1] * 81, 1), make_prompt(2, [*[1] * 80, 2], 75)]
    _, model = run_all(prompts, Options(max_cache_bytes=156))
    assert all(path_bytes(prompt, Options()) <= 156 for prompt in prompts)
    assert model.schedule.peak_bytes <= 156


@given(prompt_lists, options, st.integers(0, 2**20))
def test_failed_steps_change_no_answer_but_that_of_a_prompt_that_fails_alone(
    prompts: list[Prompt], options: Options, seed: int
) -> None:
    # The fourth prompt breaks every step of its own, and steps break at random while there are several prompts.
    def breaks(step: Step) -> bool:
        running = [span.running for span in step.spans if span.running is not None]
        is_random = rng.random() < 0.1 and len(running) > 1
        return is_random or any(one.prompt.prompt_id == "3" for one in running)

    rng = np.random.default_rng(seed)
    found, model = run_all(prompts, options, breaks)
    for prompt in prompts:
        finished = found[prompt.prompt_id]
        if finished.error is None:
            assert finished.token_ids == answer_alone(prompt)
        else:
            assert finished.token_ids == answer_alone(prompt)[: len(finished.token_ids)]
    assert all(one.error is None for name, one in found.items() if name != "3")
    assert model.schedule.live_bytes == 0


def test_answers_that_outgrow_the_budget_are_continued_and_not_lost() -> None:
    prompts = [make_prompt(i, [i, i], 150) for i in range(4)]
    found, model = run_all(prompts, Options(max_cache_bytes=300))
    assert model.schedule.num_preemptions > 0
    assert [found[str(i)].token_ids for i in range(4)] == [answer_alone(prompt) for prompt in prompts]
    # What a preempted prompt had answered goes through the model again, but is not drawn again.
    assert model.num_computed_prompt_tokens > model.schedule.num_tree_tokens == 8


def test_admission_is_in_token_order_so_that_shared_prefixes_live_together() -> None:
    prompts = [make_prompt(i, [i % 3, i % 3, i % 3, i], 1) for i in range(30)]
    model = FakeModel(make_schedule(prompts, Options(max_running=4)))
    order = [int(finished.prompt_id) for finished in model.run()]
    assert [i % 3 for i in order] == sorted(i % 3 for i in range(30))


def test_finished_prompts_make_room_at_once() -> None:
    prompts = [make_prompt(i, [i], 1 + 9 * (i == 0)) for i in range(10)]
    _, model = run_all(prompts, Options(max_running=2))
    # One prompt decodes for ten steps while nine pass through the other place.
    assert model.num_steps == 10


@pytest.mark.parametrize("max_step_rows", [1, 5, 64])
def test_decodes_do_not_wait_for_prefills_of_others(max_step_rows: int) -> None:
    schedule = make_schedule(
        [make_prompt(0, [0], 30), make_prompt(1, [1] * 40, 2)], Options(max_step_rows=max_step_rows)
    )
    model = FakeModel(schedule)
    num_decoded: list[int] = []
    for _ in range(20):
        model._step()
        num_decoded += [len(running.answer) for running in schedule.running if running.prompt.prompt_id == "0"]
    assert num_decoded == list(range(1, 21))


def test_answer_ends_at_a_stop_token_that_is_its_last() -> None:
    prompts = [make_prompt(i, [i, 1], 60, stop_token_ids=frozenset({END_TOKEN})) for i in range(12)]
    found, _ = run_all(prompts)
    for prompt in prompts:
        finished = found[prompt.prompt_id]
        expected = answer_alone(prompt)
        assert finished.token_ids == expected
        assert finished.finish_reason == ("stop" if expected[-1] == END_TOKEN else "length")
    assert {finished.finish_reason for finished in found.values()} == {"stop"}


def test_answer_ends_when_its_caller_says_that_it_is_over() -> None:
    seen: list[int] = []

    def is_over(answer: Sequence[int]) -> bool:
        seen.append(len(answer))
        return sum(answer) > 20

    (finished,) = run_all([make_prompt(0, [5], 60, is_over=is_over)])[0].values()
    assert finished.finish_reason == "stop"
    assert sum(finished.token_ids[:-1]) <= 20 < sum(finished.token_ids)
    assert seen == list(range(1, len(finished.token_ids) + 1))


def test_stop_on_the_last_token_that_is_allowed_is_a_stop() -> None:
    prompt = make_prompt(0, [5], 60, stop_token_ids=frozenset({END_TOKEN}))
    num_tokens = len(answer_alone(prompt))
    (finished,) = run_all([make_prompt(0, [5], num_tokens, stop_token_ids=frozenset({END_TOKEN}))])[0].values()
    assert (len(finished.token_ids), finished.finish_reason) == (num_tokens, "stop")


def test_prompts_are_pulled_one_window_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule_module, "MAX_WINDOW_PROMPTS", 5)
    num_pulled = 0

    def endless() -> Iterator[Prompt]:
        nonlocal num_pulled
        while True:
            yield make_prompt(num_pulled, [num_pulled % 7, num_pulled % 3], 3)
            num_pulled += 1

    schedule = make_schedule(endless(), Options(max_running=4))
    assert num_pulled == 0
    run = FakeModel(schedule).run()
    for num_finished in range(1, 60):
        next(run)
        # Those that run, and at most one window that waits.
        assert num_pulled <= num_finished + 4 + 5
    assert schedule.num_planned >= num_pulled


def test_windows_are_bounded_by_tokens_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule_module, "MAX_WINDOW_TOKENS", 100)
    pulled: list[int] = []

    def source() -> Iterator[Prompt]:
        for i in range(50):
            pulled.append(i)
            yield make_prompt(i, [i] * 30, 1)

    schedule = make_schedule(source(), Options(max_running=1))
    assert schedule.has_work()
    assert len(pulled) == 4
    assert len(list(FakeModel(schedule).run())) == 50


@given(prompt_lists, st.integers(1, 4))
def test_windows_lose_sharing_but_no_prompt(prompts: list[Prompt], num_prompts: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule_module, "MAX_WINDOW_PROMPTS", num_prompts)
        found, model = run_all(prompts)
    assert all(found[prompt.prompt_id].token_ids == answer_alone(prompt) for prompt in prompts)
    assert model.num_computed_prompt_tokens == model.schedule.num_tree_tokens


def test_run_without_prompts_has_no_work() -> None:
    schedule = make_schedule([])
    assert not schedule.has_work()
    assert (schedule.num_planned, schedule.num_tree_tokens) == (0, 0)
