"""Refusals are held while they form one unbroken series; an answer to what was sent after them ends it."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from moebeam.model_runner.openai_engine.outages.refusals import Refusals


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class Scene:
    """A series of at most three rows; rows that are held wait as tasks of their own."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.refusals = Refusals(3, clock=self.clock)
        self.verdicts: dict[str, bool] = {}

    async def refuse(self, row: str, kind: str = "no", owner: object = None) -> bool:
        self.clock.now += 1
        is_too_long = self.refusals.add(kind, row)

        async def hold() -> None:
            self.verdicts[row] = await self.refusals.hold(owner)

        self.task = asyncio.create_task(hold())
        await asyncio.sleep(0)
        return is_too_long

    async def answer(self, started_at: float) -> None:
        self.refusals.record_answer(started_at)
        await self.settle()

    async def settle(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)


def played(scene: Callable[[Scene], Awaitable[None]]) -> None:
    async def play() -> None:
        await scene(Scene())

    asyncio.run(play())


def test_the_series_is_too_long_at_its_limit_of_distinct_rows() -> None:
    async def scene(at: Scene) -> None:
        assert [await at.refuse(row) for row in ("a", "b", "a", "b", "c")] == [False] * 4 + [True]
        assert at.verdicts == {}

    played(scene)


def test_another_refusal_begins_another_series_and_releases_the_first() -> None:
    async def scene(at: Scene) -> None:
        for row in ("a", "b"):
            await at.refuse(row)
        assert not await at.refuse("c", "other")
        await at.settle()
        assert at.verdicts == {"a": True, "b": True} and at.refusals.num_rows == 1

    played(scene)


def test_an_answer_releases_what_was_refused_before_it_was_sent_and_no_more() -> None:
    async def scene(at: Scene) -> None:
        await at.refuse("a")
        sent_at = at.clock.now + 0.5
        await at.refuse("b")
        await at.answer(sent_at)
        assert at.verdicts == {"a": True} and at.refusals.num_rows == 1
        await at.answer(0.0)
        assert "b" not in at.verdicts

    played(scene)


def test_the_end_of_one_input_releases_its_own_rows_and_counts_on() -> None:
    async def scene(at: Scene) -> None:
        one, other = object(), object()
        await at.refuse("a", owner=one)
        await at.refuse("b", owner=other)
        at.refusals.release(one)
        await at.settle()
        assert at.verdicts == {"a": True} and at.refusals.num_held(other) == 1
        assert await at.refuse("c", owner=other)

    played(scene)


def test_a_provider_that_refuses_everybody_makes_no_rejects() -> None:
    async def scene(at: Scene) -> None:
        await at.refuse("a")
        await at.refuse("b")
        at.refusals.drop()
        await at.settle()
        assert at.verdicts == {"a": False, "b": False}

    played(scene)


def test_who_no_longer_waits_is_no_longer_held() -> None:
    async def scene(at: Scene) -> None:
        owner = object()
        await at.refuse("a", owner=owner)
        at.task.cancel()
        await at.settle()
        assert at.refusals.num_held(owner) == 0

    played(scene)
