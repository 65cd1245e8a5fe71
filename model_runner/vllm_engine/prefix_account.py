"""The order in which vLLM gets requests, the rank that gets each, and what its prefix caches could serve and did."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from moebeam.model_runner.prefix_tree import common_prefix_lengths, num_tokens_of, prefix_key
from moebeam.model_runner.vllm_engine.prefix_units import PrefixUnit, Reach, measure_reach, unit_key
from moebeam.schemas.records import Request


class PrefixAccount:
    """Arranges requests by units and counts; safe from several calls of `generate` at once."""

    def __init__(self, unit: PrefixUnit) -> None:
        self.unit = unit
        self._lock = threading.Lock()
        self._reach = Reach()
        self._num_hit = 0

    def arrange(self, requests: Sequence[Request], find_adapter: Callable[[Request], str | None]) -> list[Request]:
        """Put requests in the order in which the cache serves them best: groups that share whole units side by side.

        Adapters and tenants are apart, as their entries never match. Inside a group requests stay in token order.
        """
        keyed = sorted(
            (
                unit_key(request, self.unit, adapter := find_adapter(request)),
                prefix_key(request.tenant, request.prompt_token_ids),
                number,
                adapter,
            )
            for number, request in enumerate(requests)
        )
        by_adapter: dict[str | None, list[bytes]] = {}
        for _, key, _, adapter in keyed:
            by_adapter.setdefault(adapter, []).append(key)
        for keys in by_adapter.values():
            keys.sort()
            reach = measure_reach([num_tokens_of(key) for key in keys], common_prefix_lengths(keys), self.unit)
            with self._lock:
                self._reach += reach
        return [requests[number] for _, _, number, _ in keyed]

    def count_hit(self, num_tokens: int) -> None:
        """Take what vLLM served a request from its cache."""
        with self._lock:
            self._num_hit += num_tokens

    def counters(self) -> Mapping[str, float]:
        """Sums by name, as of `CountingRunner`."""
        with self._lock:
            return {
                "num_arranged_tokens": self._reach.num_tokens,
                "num_shared_tokens": self._reach.num_shared,
                "num_reachable_tokens": self._reach.num_reachable,
                "num_hit_tokens": self._num_hit,
                "peak_prefix_unit": self.unit.num_tokens,
                "peak_block_size": self.unit.block_size,
                "peak_missed_prefix": self._reach.longest_missed,
            }


class Ranks:
    """Which data parallel rank gets a request: that of its group, while it has room.

    Args:
        max_in_flight: requests of a rank; a group that is larger goes on at the rank with the least.
    """

    def __init__(self, num_ranks: int, max_in_flight: int) -> None:
        self._lock = threading.Lock()
        self._max_in_flight = max_in_flight
        self._num_in_flight = Counter(dict.fromkeys(range(num_ranks), 0))
        self._last: tuple[tuple[str, bytes], int] | None = None

    def take(self, group: tuple[str, bytes]) -> int | None:
        """The rank for a request of a group, None where there is only one."""
        if len(self._num_in_flight) == 1:
            return None
        with self._lock:
            rank = min(self._num_in_flight, key=lambda each: (self._num_in_flight[each], each))
            if (
                self._last is not None
                and self._last[0] == group
                and self._num_in_flight[self._last[1]] < self._max_in_flight
            ):
                rank = self._last[1]
            self._last = (group, rank)
            self._num_in_flight[rank] += 1
            return rank

    def give_back(self, ranks: Iterable[int | None]) -> None:
        """Take back the places of requests that are over."""
        with self._lock:
            for rank in ranks:
                if rank is not None:
                    self._num_in_flight[rank] -= 1
