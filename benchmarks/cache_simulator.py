"""What the order of requests is worth at a provider: `python -m benchmarks.cache_simulator`.

Simulates a prefix cache by DeepSeek's documented rules: a hit needs the full match of a stored unit; units are stored
at the end of an input, and at the end of a prefix that two requests were seen to share; A+B then A+C misses, a third
A+D hits A. A unit can be hit once the request that stored it has been answered. Fixed intervals, whose length is not
documented, and eviction are left out, so that real shares are higher in one case and lower in the other.

Compares requests in the order of their arrival, in planned order, and in planned order with the first of each prefix
ahead (`model_runner/openai_engine/prefix_gate.py`), beside h*, which no cache can exceed.
"""

import argparse
import bisect
import heapq
import itertools
import json
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from moebeam.model_runner.openai_engine.prefix_gate import PrefixGate, WarmPrefixes
from moebeam.model_runner.openai_engine.profiles import find_profile
from moebeam.model_runner.prefix_tree import common_prefix_length
from moebeam.schemas.records import Message, Request, Sampling, TokenIds


class PrefixCache:
    """The documented rules, over whole inputs."""

    def __init__(self) -> None:
        self._seen: list[tuple[bytes, TokenIds]] = []
        self._units: set[bytes] = set()
        self._lengths: set[int] = set()

    def num_hit(self, token_ids: TokenIds) -> int:
        """Tokens of the longest stored unit that the input begins with."""
        fitting = sorted((length for length in self._lengths if length <= token_ids.shape[0]), reverse=True)
        return next((length for length in fitting if token_ids[:length].tobytes() in self._units), 0)

    def store(self, token_ids: TokenIds) -> None:
        """Take an answered request: its input becomes a unit, and so does what it shares with those before."""
        self._add(token_ids)
        key = token_ids.astype(">u4").tobytes()
        at = bisect.bisect_left(self._seen, key, key=lambda entry: entry[0])
        # What it shares with others than its neighbours in token order, these shared with them before.
        for _, other in self._seen[max(0, at - 1) : at + 1]:
            if num_shared := common_prefix_length(other, token_ids):
                self._add(token_ids[:num_shared])
        self._seen.insert(at, (key, token_ids))

    def _add(self, token_ids: TokenIds) -> None:
        self._units.add(token_ids.tobytes())
        self._lengths.add(int(token_ids.shape[0]))


@dataclass(frozen=True, slots=True)
class Workload:
    """Documents that each get some questions, behind one system prompt; all lengths in tokens."""

    num_documents: int
    num_questions: int
    num_system: int
    num_document: int
    num_question: int

    def requests(self, seed: int = 0) -> list[Request]:
        """In planned order."""
        draw = np.random.default_rng(seed)

        def words(num: int) -> TokenIds:
            return draw.integers(0, 100_000, num).astype(np.int32)

        system, found = words(self.num_system), []
        for document in range(self.num_documents):
            text = np.concatenate([system, words(self.num_document)])
            for question in range(self.num_questions):
                token_ids = np.concatenate([text, words(self.num_question)]).astype(np.int32)
                found.append(Request(f"{document}-{question}", token_ids, (Message("user", ""),), Sampling(1)))
        return sorted(found, key=lambda request: request.prompt_token_ids.astype(">u4").tobytes())


@dataclass(frozen=True, slots=True)
class Outcome:
    """One order's result; `duration` is in mean answer times."""

    hit_share: float
    duration: float


def simulate(requests: Sequence[Request], *, concurrency: int, num_leaders: int, seed: int = 0) -> Outcome:
    """Send requests in the order given, as places come free; answers take around one unit of time."""
    profile = find_profile("deepseek")
    gate = PrefixGate(num_leaders=num_leaders, min_prefix_tokens=profile.min_prefix_tokens, warm=WarmPrefixes())
    draw, cache = random.Random(seed), PrefixCache()
    waiting = list(reversed(requests))
    ready: deque[Request] = deque()
    away: list[tuple[float, str]] = []
    by_id = {request.request_id: request for request in requests}
    now, num_hit, num_tokens = 0.0, 0, 0
    while waiting or ready or away:
        while waiting and len(ready) + len(away) < 2 * concurrency:
            ready += gate.offer(waiting.pop())
        while ready and len(away) < concurrency:
            request = ready.popleft()
            num_hit += cache.num_hit(request.prompt_token_ids)
            num_tokens += request.num_prompt_tokens
            heapq.heappush(away, (now + draw.uniform(0.5, 1.5), request.request_id))
        now, request_id = heapq.heappop(away)
        cache.store(by_id[request_id].prompt_token_ids)
        ready += gate.finish(request_id)
    return Outcome(num_hit / num_tokens, now)


def most_possible(requests: Sequence[Request]) -> float:
    """h*: what a cache that forgets nothing and is asked one by one could hit."""
    tokens = [request.prompt_token_ids for request in requests]
    shared = sum(common_prefix_length(one, other) for one, other in itertools.pairwise(tokens))
    return shared / sum(token_ids.shape[0] for token_ids in tokens)


def compare(workload: Workload, *, concurrency: int) -> dict[str, float]:
    """Shares of prompt tokens that hit, by order, and the duration that leaders cost."""
    planned = workload.requests()
    arrival = random.Random(1).sample(planned, len(planned))
    outcomes = {
        "arrival": simulate(arrival, concurrency=concurrency, num_leaders=0),
        "planned": simulate(planned, concurrency=concurrency, num_leaders=0),
        "planned_one_leader": simulate(planned, concurrency=concurrency, num_leaders=1),
        "planned_two_leaders": simulate(planned, concurrency=concurrency, num_leaders=2),
    }
    found = {"h_star": most_possible(planned)}
    for name, outcome in outcomes.items():
        found[f"{name}_hit_share"] = outcome.hit_share
        found[f"{name}_duration"] = outcome.duration
    return found


def main() -> None:
    """Print one line of JSON a workload."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cache_simulator")
    parser.add_argument("--concurrency", type=int, default=200)
    args = parser.parse_args()
    for workload in (
        Workload(num_documents=1, num_questions=3000, num_system=1500, num_document=0, num_question=150),
        Workload(num_documents=300, num_questions=10, num_system=500, num_document=2000, num_question=60),
        Workload(num_documents=30, num_questions=100, num_system=500, num_document=2000, num_question=60),
    ):
        found = {name: round(value, 3) for name, value in compare(workload, concurrency=args.concurrency).items()}
        print(json.dumps({**asdict(workload), "concurrency": args.concurrency, **found}))


if __name__ == "__main__":
    main()
