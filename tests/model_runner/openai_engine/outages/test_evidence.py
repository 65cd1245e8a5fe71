"""A request is given up for what it met alone: often enough, between answers to others, and beyond chance."""

import random
from dataclasses import dataclass

import pytest

from moebeam.model_runner.openai_engine.failures import CallFailure, Consequence
from moebeam.model_runner.openai_engine.outages.circuit import OutagePolicy
from moebeam.model_runner.openai_engine.outages.evidence import Evidence, OwnFailures
from moebeam.schemas.errors import EngineFailed

MAX_OUTAGE_S = 600.0


@dataclass
class Scene:
    """An endpoint with a clock of its own; a call takes a second."""

    max_retries: int = 3
    now: float = 0.0

    def __post_init__(self) -> None:
        self.evidence = Evidence(self.max_retries, OutagePolicy(MAX_OUTAGE_S), clock=lambda: self.now)
        self.own = OwnFailures()

    def answer_others(self, num: int = 1) -> None:
        for _ in range(num):
            self.now += 1
            self.evidence.record_answer(OwnFailures(), self.now - 1)

    def fail_others(self, num: int = 1) -> None:
        for _ in range(num):
            self.now += 1
            self.evidence.record_failure(OwnFailures(), failed("failed"), self.now - 1)

    def fail(self, consequence: Consequence = "failed") -> bool:
        self.now += 1
        self.evidence.record_failure(self.own, failed(consequence), self.now - 1)
        return self.evidence.is_own(self.own)


def failed(consequence: Consequence) -> CallFailure:
    return CallFailure(consequence, EngineFailed("no"))


def test_a_request_that_fails_again_and_again_among_answers_is_given_up_after_its_tries() -> None:
    scene, verdicts = Scene(max_retries=6), list[bool]()
    for _ in range(7):
        verdicts.append(scene.fail())
        scene.answer_others(5)
    assert verdicts == [False] * 6 + [True]


def test_no_request_is_given_up_before_its_tries_are_used_up() -> None:
    scene = Scene(max_retries=20)
    for _ in range(20):
        assert not scene.fail()
        scene.answer_others(50)
    assert scene.fail()


@pytest.mark.parametrize("consequence", ["failed", "unreachable", "overload", "closed"])
def test_where_nobody_is_answered_nobody_is_given_up(consequence: Consequence) -> None:
    scene = Scene(max_retries=0)
    scene.answer_others(100)
    for _ in range(300):
        scene.now += 10
        assert not scene.fail(consequence)
        scene.fail_others()


def test_one_answer_at_the_edge_of_an_outage_gives_nobody_up() -> None:
    scene = Scene(max_retries=2)
    scene.answer_others(100)
    scene.fail()
    scene.answer_others(30)
    assert not any(scene.fail() for _ in range(50))


def test_answers_to_what_was_sent_before_it_failed_are_no_evidence() -> None:
    scene = Scene(max_retries=2)
    for _ in range(50):
        assert not scene.fail()
        scene.evidence.record_answer(OwnFailures(), 0.0)


def test_a_connection_that_is_never_made_is_nobodys_failure() -> None:
    scene = Scene(max_retries=0)
    for _ in range(100):
        assert not scene.fail("unreachable")
        scene.answer_others(5)


@pytest.mark.parametrize("share_failed", [0.3, 0.5, 0.8])
def test_by_chance_hardly_any_request_is_given_up(share_failed: float) -> None:
    draw = random.Random(3)
    num_given_up = 0
    for _ in range(2000):
        scene = Scene(max_retries=1)
        while draw.random() < share_failed:
            if scene.fail():
                num_given_up += 1
                break
            for _ in range(4):
                (scene.fail_others if draw.random() < share_failed else scene.answer_others)()
    assert num_given_up == 0


def test_a_poison_request_is_given_up_beside_a_provider_that_fails_on_every_second_call() -> None:
    scene, num_tries = Scene(max_retries=3), 1
    while not scene.fail():
        num_tries += 1
        for _ in range(3):
            scene.fail_others()
            scene.answer_others()
    assert 15 < num_tries < 40


def test_overload_is_borne_for_as_long_as_an_outage_and_no_longer_where_others_get_through() -> None:
    scene = Scene(max_retries=1)
    while not scene.fail("overload"):
        scene.answer_others()
        scene.now += 8
    assert MAX_OUTAGE_S <= scene.now - scene.own.first_overloaded_at < MAX_OUTAGE_S + 20


def test_others_are_needed_once_the_tries_are_used_up_and_nobody_was_answered_since() -> None:
    scene = Scene(max_retries=1)
    scene.answer_others(10)
    scene.fail()
    assert not scene.evidence.needs_others(scene.own)
    scene.fail()
    assert scene.evidence.needs_others(scene.own)
    scene.answer_others()
    assert not scene.evidence.needs_others(scene.own)
    scene.fail()
    assert scene.evidence.needs_others(scene.own)
