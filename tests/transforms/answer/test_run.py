"""Engines are held to one completion a request."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from moebeam.schemas.errors import EngineContractError, EngineFailed
from moebeam.schemas.records import Completion, Request, Sampling, Usage
from moebeam.transforms.answer.run import run


def request(name: str) -> Request:
    return Request(name, np.array([1], np.int32), (), Sampling(max_tokens=1))


def completion(name: str) -> Completion:
    return Completion(name, "x", "stop", Usage(1, 1, 0), datetime.now(UTC), 1.0, "p", "m", "r")


class Engine:
    """Answers the requests whose names are given, in that order, after pulling all."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        list(requests)
        yield from (completion(name) for name in self._names)


def test_completions_pass_in_the_engine_order() -> None:
    found = list(run([request("a"), request("b")], Engine("b", "a")))
    assert [c.request_id for c in found] == ["b", "a"]
    assert all(c.error is None for c in found)


def test_a_request_without_an_answer_becomes_a_typed_failure() -> None:
    first, second = run([request("a"), request("b")], Engine("b"))
    assert (first.request_id, second.request_id) == ("b", "a")
    assert isinstance(second.error, EngineFailed)
    assert second.usage == replace(second.usage, prompt_tokens=0, completion_tokens=0)


@pytest.mark.parametrize("names", [("a", "a"), ("c",)])
def test_an_answer_that_nobody_asked_for_stops_the_job(names: tuple[str, ...]) -> None:
    with pytest.raises(EngineContractError, match="expected one completion a request"):
        list(run([request("a"), request("b")], Engine(*names)))


class Uncounted:
    """Answers without a usage, the second with estimates of its own."""

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for found in requests:
            usage = Usage(None, None)
            yield replace(
                completion(found.request_id),
                text="five words of some text",
                usage=usage.with_estimates(9, 9) if found.request_id == "b" else usage,
            )


def test_tokens_that_no_engine_counted_are_estimated_from_the_prompt_and_the_text() -> None:
    first, second = run([request("a"), request("b")], Uncounted())
    assert (first.error, first.usage.prompt_tokens, first.usage.completion_tokens) == (None, None, None)
    assert (first.usage.estimated_prompt_tokens, first.usage.estimated_completion_tokens) == (1, 6)
    assert (second.usage.estimated_prompt_tokens, second.usage.estimated_completion_tokens) == (9, 9)


def test_token_counts_that_contradict_each_other_are_kept_and_no_failure() -> None:
    class Wrong:
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            for found in requests:
                yield replace(completion(found.request_id), usage=Usage(1, 1, cached_tokens=2))

    (only,) = run([request("a")], Wrong())
    assert (only.error, only.usage.cached_tokens, only.usage.status) == (None, 2, "contradictory")
