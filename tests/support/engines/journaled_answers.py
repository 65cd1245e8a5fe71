"""Requests with answers of every kind, and an engine that gives them, behind a journal."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
from hypothesis import strategies as st

from moebeam.schemas.errors import ContentRefused, EngineTimeout, RowError
from moebeam.schemas.records import Completion, LostCall, Message, Request, Sampling, ToolCall, Usage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.journal import JournaledRunner, ShardJournal, keeping_runner

NOW = datetime(2026, 11, 24, 1, 2, 3, 456789, UTC)


TEXT = st.text(max_size=20)


COUNT = st.one_of(st.none(), st.integers(-1, 9), st.just(10**26))


ERRORS: list[RowError | None] = [None, ContentRefused("no"), EngineTimeout("späť")]


COMPLETIONS = st.builds(
    Completion,
    request_id=st.sampled_from(["0", "1", "17"]),
    text=st.one_of(TEXT, st.text(st.characters(categories=["Cs", "Ll"]), max_size=5)),
    finish_reason=st.sampled_from(["stop", "length", "tool_calls", "error"]),
    usage=st.builds(
        lambda usage, estimates: usage.with_estimates(*estimates),
        st.builds(Usage, COUNT, COUNT, COUNT, st.integers(-1, 9)),
        st.tuples(st.integers(0, 9), st.integers(0, 9)),
    ),
    provider_finish_reason=st.one_of(st.none(), TEXT),
    started_at=st.datetimes(timezones=st.just(UTC)),
    latency_ms=st.floats(0, 1e6),
    provider=TEXT,
    model=TEXT,
    model_revision=TEXT,
    reasoning_content=st.one_of(st.none(), TEXT),
    tool_calls=st.lists(st.builds(ToolCall, TEXT, TEXT, TEXT), max_size=2).map(tuple),
    logprobs=st.one_of(st.none(), st.lists(st.floats(max_value=0, allow_nan=False), max_size=3).map(tuple)),
    repaired=st.sampled_from([(), ("text_for_json", "string_attribute")]),
    error=st.sampled_from(ERRORS),
    lost_calls=st.lists(
        st.builds(LostCall, TEXT, TEXT, TEXT, st.just(NOW), st.integers(0, 9), st.integers(0, 9)), max_size=2
    ).map(tuple),
)


def same(one: Completion, other: Completion) -> bool:
    """Equal in every field; errors are equal by type and words."""
    errors = [error and (type(error), str(error)) for error in (one.error, other.error)]
    return errors[0] == errors[1] and replace(one, error=None) == replace(other, error=None)


def request(name: int, text: str = "hi", attempt: int = 1, tenant: str = "") -> Request:
    messages = (Message("user", text),)
    return Request(str(name), np.zeros(1, np.int32), messages, Sampling(max_tokens=5), tenant=tenant, attempt=attempt)


def answer(to: Request, text: str = "an answer", error: RowError | None = None, num_tokens: int = 3) -> Completion:
    usage = Usage(prompt_tokens=num_tokens, completion_tokens=num_tokens, cached_tokens=0)
    return Completion(to.request_id, text, "stop", usage, NOW, 1.5, "deepseek", "flash", "fp", error=error)


class Engine:
    """Answers with a number that counts its calls; fails as told."""

    def __init__(self, *failing: tuple[str, RowError, int]) -> None:
        self.asked: list[str] = []
        self._failing = {name: (error, num_tokens) for name, error, num_tokens in failing}

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for each in requests:
            self.asked.append(each.request_id)
            error, num_tokens = self._failing.get(each.request_id, (None, 3))
            yield answer(each, f"answer {len(self.asked)}", error, num_tokens)


def journaled(engine: Engine, journal: ShardJournal) -> JournaledRunner:
    return JournaledRunner(keeping_runner(engine, journal), journal)


def answers_of(layout: RunLayout, engine: Engine, *requests: Request, takes_failures: bool = True) -> list[Completion]:
    """One attempt of a shard."""
    with ShardJournal.open(layout, "s0", takes_failures=takes_failures) as journal:
        return list(journaled(engine, journal).generate(requests))
