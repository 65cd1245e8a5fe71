"""The first requests of a shared prefix go ahead of the rest."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.model_runner.openai_engine.prefix_gate import PrefixGate, WarmPrefixes
from moebeam.schemas.records import Message, Request, Sampling


def request(name: str, *parts: int, tenant: str = "") -> Request:
    """Each part is ten tokens long."""
    token_ids = np.repeat(np.array(parts, dtype=np.int32), 10)
    return Request(name, token_ids, (Message("user", name),), Sampling(5), tenant=tenant)


def gate(num_leaders: int = 2, warm: WarmPrefixes | None = None) -> PrefixGate:
    return PrefixGate(num_leaders=num_leaders, min_prefix_tokens=10, warm=warm or WarmPrefixes())


def ids(requests: list[Request]) -> list[str]:
    return [each.request_id for each in requests]


def test_one_leader_goes_first_and_the_rest_follows_together() -> None:
    rest = gate(1)
    assert ids(rest.offer(request("a", 1, 2))) == ["a"]
    assert ids(rest.offer(request("b", 1, 3))) == []
    assert ids(rest.offer(request("c", 1, 4))) == []
    assert rest.num_held == 2
    assert ids(rest.finish("a")) == ["b", "c"]
    assert rest.num_held == 0


def test_two_leaders_go_one_after_the_other() -> None:
    rest = gate(2)
    assert [ids(rest.offer(request(name, 1, part))) for part, name in enumerate("abcd", 2)] == [["a"], [], [], []]
    assert ids(rest.finish("a")) == ["b"]
    assert ids(rest.finish("b")) == ["c", "d"]


def test_prefixes_that_share_nothing_do_not_wait_for_each_other() -> None:
    rest = gate()
    offered = [request("a", 1, 2), request("b", 1, 3), request("x", 5, 6), request("y", 5, 7)]
    assert [ids(rest.offer(each)) for each in offered] == [["a"], [], ["x"], []]
    assert ids(rest.finish("x")) == ["y"]


def test_prefix_that_was_shown_before_is_not_waited_for_in_the_next_shard() -> None:
    warm = WarmPrefixes()
    first = gate(1, warm)
    first.offer(request("a", 1, 2))
    first.offer(request("b", 1, 3))
    first.finish("a")
    second = gate(1, warm)
    assert ids(second.offer(request("c", 1, 4))) == ["c"]
    assert ids(second.offer(request("d", 1, 5))) == ["d"]


def test_leader_that_is_through_before_the_next_comes_is_not_waited_for() -> None:
    rest = gate(1)
    rest.offer(request("a", 1, 2))
    rest.finish("a")
    assert ids(rest.offer(request("b", 1, 3))) == ["b"]


def test_short_common_beginnings_are_not_waited_for() -> None:
    rest = PrefixGate(num_leaders=2, min_prefix_tokens=11, warm=WarmPrefixes())
    assert [ids(rest.offer(each)) for each in (request("a", 1, 2), request("b", 1, 3))] == [["a"], ["b"]]


def test_tenants_never_wait_for_each_other() -> None:
    rest = gate()
    rest.offer(request("a", 1, 2, tenant="one"))
    assert ids(rest.offer(request("b", 1, 2, tenant="two"))) == ["b"]


def test_no_leaders_let_everything_through() -> None:
    rest = gate(0)
    assert [ids(rest.offer(request(name, 1, 2))) for name in "abc"] == [["a"], ["b"], ["c"]]


def test_warm_prefixes_are_bounded() -> None:
    warm = WarmPrefixes(2)
    for digest in (b"1", b"2", b"1", b"3"):
        warm.add(digest)
    assert (b"1" in warm, b"2" in warm, b"3" in warm) == (True, False, True)


@pytest.mark.parametrize("num_leaders", [1, 2, 3])
@given(data=st.data())
def test_every_request_leaves_once_whatever_the_order_of_answers(num_leaders: int, data: st.DataObject) -> None:
    parts = data.draw(st.lists(st.lists(st.integers(0, 2), max_size=4), max_size=30))
    offered = [request(str(number), *path) for number, path in enumerate(sorted(parts))]
    rest, away, left = gate(num_leaders), [], []
    while offered or away:
        if offered and (not away or data.draw(st.booleans())):
            leaving = rest.offer(offered.pop(0))
        else:
            leaving = rest.finish(away.pop(data.draw(st.integers(0, len(away) - 1))))
        away += ids(leaving)
        left += ids(leaving)
    assert sorted(left, key=int) == [str(number) for number in range(len(parts))]
    assert rest.num_held == 0
