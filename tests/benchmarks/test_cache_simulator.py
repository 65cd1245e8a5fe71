"""The simulated prefix cache keeps the documented rules, and leaders are worth what the report says."""

import numpy as np

from benchmarks.cache_simulator import PrefixCache, Workload, compare


def tokens(*parts: int) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
    return np.repeat(np.array(parts, dtype=np.int32), 10)


def test_second_request_of_a_prefix_misses_and_the_third_hits() -> None:
    cache = PrefixCache()
    cache.store(tokens(1, 2))
    assert cache.num_hit(tokens(1, 3)) == 0
    cache.store(tokens(1, 3))
    assert cache.num_hit(tokens(1, 4)) == 10


def test_whole_input_is_a_unit() -> None:
    cache = PrefixCache()
    cache.store(tokens(1, 2))
    assert cache.num_hit(tokens(1, 2, 5)) == 20
    assert cache.num_hit(tokens(1)) == 0


def test_planned_order_pays_only_with_leaders_ahead() -> None:
    workload = Workload(num_documents=6, num_questions=30, num_system=200, num_document=400, num_question=20)
    found = compare(workload, concurrency=60)
    planned, leaders = found["planned_hit_share"], found["planned_two_leaders_hit_share"]
    assert planned < found["arrival_hit_share"] < leaders <= found["h_star"]
    # Two of thirty questions a document cannot hit it.
    assert leaders > found["h_star"] * 0.93
