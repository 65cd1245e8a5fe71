"""When a provider counts as out, when it is asked again, and when it is waited for no more; by a clock of the test."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest

from moebeam.model_runner.openai_engine.failures import CallFailure, Consequence
from moebeam.model_runner.openai_engine.outages.circuit import Circuit, OutagePolicy
from moebeam.schemas.errors import EngineFailed


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def failed(consequence: Consequence = "failed", message: str = "p: HTTP 500", **values: Any) -> CallFailure:
    return CallFailure(consequence, EngineFailed(message), **values)


def circuit(clock: Clock, max_outage_s: float = 600.0, *, has_answered: bool = True, **values: Any) -> Circuit:
    made = Circuit("p", OutagePolicy(max_outage_s, **values), clock=clock, draw=lambda: 1.0)
    if has_answered:
        made.record_answer()
    return made


def open_now(clock: Clock, max_outage_s: float = 600.0) -> Circuit:
    made = circuit(clock, max_outage_s)
    assert made.record_failure(failed("unreachable"), is_probe=False)
    return made


def test_a_few_failures_in_a_row_are_an_outage_and_an_answer_between_them_is_none() -> None:
    made = circuit(Clock())
    assert [made.record_failure(failed(), is_probe=False) for _ in range(2)] == [False, False]
    assert not made.record_answer()
    assert [made.record_failure(failed(), is_probe=False) for _ in range(3)] == [False, False, True]
    assert made.is_open and made.num_outages == 1


def test_a_connection_that_cannot_be_made_is_an_outage_at_once() -> None:
    assert open_now(Clock()).is_open


def test_refusals_for_overload_are_an_outage_once_nothing_was_answered_for_seconds() -> None:
    made = circuit(clock := Clock(), overload_s=5.0)
    for _ in range(50):
        assert not made.record_failure(failed("overload"), is_probe=False)
    clock.now += 4.9
    assert not made.record_failure(failed("overload"), is_probe=False)
    made.record_answer()
    clock.now += 1.0
    assert not made.record_failure(failed("overload"), is_probe=False)
    clock.now += 5.0
    assert made.record_failure(failed("overload"), is_probe=False)


def test_a_closed_door_ends_it_at_once_unless_somebody_was_answered_before() -> None:
    made = circuit(Clock(), has_answered=False)
    assert made.record_failure(failed("closed", "p: HTTP 401"), is_probe=False)
    assert made.down == "p: HTTP 401" and not made.is_open
    made = circuit(Clock())
    for _ in range(3):
        made.record_failure(failed("closed", "p: HTTP 401"), is_probe=False)
    assert made.down is None and made.is_open


def test_probes_are_one_at_a_time_and_twice_as_far_apart_each_time_up_to_the_longest_wait() -> None:
    made, waits = open_now(clock := Clock()), list[float]()
    assert not made.claim_probe(), "not due yet"
    for _ in range(7):
        waits.append(made.wait_s())
        clock.now += made.wait_s()
        assert made.claim_probe() and not made.claim_probe()
        made.record_failure(failed(), is_probe=True)
        made.end_probe()
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_an_outage_is_probed_though_the_probe_of_the_one_before_has_not_ended() -> None:
    made = open_now(clock := Clock())
    clock.now += made.wait_s()
    assert made.claim_probe()
    made.record_refusal()
    made.record_failure(failed("unreachable"), is_probe=False)
    clock.now += made.wait_s()
    assert made.claim_probe()


def test_half_of_a_wait_is_random() -> None:
    made = Circuit("p", OutagePolicy(), clock=Clock(), draw=lambda: 0.0)
    made.record_failure(failed("unreachable"), is_probe=False)
    assert made.wait_s() == 0.5


def test_a_failure_that_is_no_probe_changes_no_wait() -> None:
    made = open_now(clock := Clock())
    clock.now += 0.5
    assert not made.record_failure(failed(), is_probe=False)
    assert made.wait_s() == 0.5


@pytest.mark.parametrize(("asked_s", "expected_s"), [(0.2, 1.0), (40.0, 40.0), (5000.0, 600.0)])
def test_the_provider_is_left_alone_as_long_as_it_asks_but_not_beyond_the_longest_outage(
    asked_s: float, expected_s: float
) -> None:
    made = circuit(Clock(), overload_s=0.0)
    made.record_failure(failed("overload", retry_after_s=asked_s), is_probe=False)
    assert made.wait_s() == expected_s


def test_the_last_try_is_at_the_end_of_the_longest_outage_and_its_failure_ends_it() -> None:
    made, num_tries = open_now(clock := Clock(), max_outage_s=100.0), 0
    while made.down is None:
        clock.now += made.wait_s()
        assert made.claim_probe()
        made.record_failure(failed(message="p: HTTP 503 busy"), is_probe=True)
        made.end_probe()
        num_tries += 1
    assert clock.now == 1100.0 and num_tries == 8
    assert "no answer since" in made.down and "for 100 s (p: HTTP 503 busy)" in made.down
    assert made.outage_s == 100.0 and not made.is_open


def test_an_outage_is_counted_from_the_first_failure() -> None:
    made = circuit(clock := Clock(), 100.0)
    for _ in range(2):
        made.record_failure(failed(), is_probe=False)
    clock.now += 99.0
    made.record_failure(failed(), is_probe=False)
    assert made.wait_s() == 1.0, "not after the end"
    clock.now += 1.0
    made.record_failure(failed(), is_probe=True)
    assert made.down is not None


def test_without_patience_the_first_outage_is_the_end() -> None:
    made = open_now(Clock(), max_outage_s=0.0)
    assert made.down is not None and made.find_outage() is None


@pytest.mark.parametrize("is_refusal", [False, True])
def test_an_answer_and_a_refusal_of_a_request_end_an_outage(is_refusal: bool) -> None:
    made = open_now(clock := Clock())
    clock.now += 7.0
    assert made.record_refusal() if is_refusal else made.record_answer()
    assert not made.is_open and made.outage_s == 7.0 and made.find_outage() is None
    assert made.wait_s() == 0.0 and not made.claim_probe()


def test_an_outage_says_since_when_and_until_when_in_the_providers_words() -> None:
    made = open_now(clock := Clock())
    clock.now += 10.0
    made.record_failure(failed(message="p: HTTP 502"), is_probe=True)
    found = made.find_outage()
    assert found is not None and (found.provider, found.message) == ("p", "p: HTTP 502")
    assert abs((datetime.now(UTC) - found.since).total_seconds() - 10.0) < 1.0
    assert (found.next_try_at - found.since).total_seconds() == pytest.approx(12.0)


def test_who_is_shut_stays_shut_for_the_first_reason() -> None:
    made = circuit(Clock())
    assert made.shut("one") and not made.shut("two")
    assert made.down == "one"
