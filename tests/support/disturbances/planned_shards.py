"""Shards that are planned and not answered, and engines that count what they are asked."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moebeam.model_runner.admission import Admission
from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from moebeam.model_runner.protocol import ModelRunner
from moebeam.schemas.answers import ShardCommit
from moebeam.schemas.errors import RequestGivenUp
from moebeam.schemas.records import Completion, LostCall, Request
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.answer_shard import AnswerSpec, LoadedEngine, answer_shard
from moebeam.transforms.answer.budget import ShardBudget
from moebeam.transforms.answer.waste import find_used, unused_lines
from moebeam.transforms.durable.journal_file import read_journal
from moebeam.transforms.plan.plan_record import read_plan
from moebeam.transforms.plan.sorted_runs import read_rows

NUM_ROWS = 40


MAX_SHARD_ROWS = 20


@dataclass(frozen=True)
class Planned:
    """A planned run in a folder of its own, and how its shards are answered."""

    spec: AnswerSpec
    encoder: PromptEncoder

    @property
    def layout(self) -> RunLayout:
        return self.spec.layout

    @property
    def shards(self) -> list[str]:
        plan = read_plan(self.layout)
        assert plan is not None
        return [shard.shard for shard in plan.shards]

    def answer(self, shard: str, runner: ModelRunner, budget: ShardBudget | None = None) -> ShardCommit | None:
        table = read_rows(self.layout.shard_plan(shard))
        return answer_shard(shard, table, LoadedEngine(runner, self.encoder), self.spec, budget)

    def ledger(self, commit: ShardCommit) -> pa.Table:
        return pq.read_table(self.layout.staged_file(commit.shard, commit.attempt, "ledger"))

    def wasted(self, commit: ShardCommit) -> pa.Table | None:
        entries, used = read_journal(self.layout, commit.shard).entries, find_used(self.ledger(commit))
        return unused_lines(self.layout, commit.shard, entries, used, self.spec.accounting)

    def texts(self, commit: ShardCommit) -> dict[str, str]:
        rows = pq.read_table(self.layout.staged_file(commit.shard, commit.attempt, "results")).to_pylist()
        return {row["custom_id"]: row["output_text"] for row in rows}


@dataclass
class Counted:
    """An engine whose requests are counted as it pulls them; `on_answer` sees each answer before anybody else.

    What an earlier attempt has answered (`Request.earlier`) passes uncounted.
    """

    runner: Any
    asked: Counter[str] = field(default_factory=Counter[str])
    on_answer: Callable[[int], None] = lambda _: None
    num_answered: int = 0

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        passed: set[int] = set()

        def counted() -> Iterator[Request]:
            for request in requests:
                if request.earlier is None:
                    self.asked[request.request_id] += 1
                else:
                    passed.add(id(request.earlier))
                yield request

        for completion in self.runner.generate(counted()):
            if id(completion) not in passed:
                self.num_answered += 1
                self.on_answer(self.num_answered)
            yield completion

    def give_back(self) -> None:
        self.runner.give_back()


@dataclass
class Remote:
    """A provider with every request in flight at once, which answers as far as `num_answers`, then waits for a stop."""

    runner: Any
    num_answers: int
    num_sent: int = 0
    is_given_back: threading.Event = field(default_factory=threading.Event)

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        raise AssertionError("asked without admission")

    def generate_admitted(self, requests: Iterable[Request], admission: Admission) -> Iterator[Completion]:
        sent = [request for request in requests if admission.admit(request) == "send"]
        self.num_sent += len(sent)
        for number, request in enumerate(sent):
            if number == self.num_answers:
                assert self.is_given_back.wait(60)
            if number < self.num_answers:
                (completion,) = self.runner.generate([request])
            else:
                lost = LostCall("fake", "tiny", "given_up", datetime.now(UTC), 10, 6)
                completion = Completion.from_error(request.request_id, RequestGivenUp("stopped"), lost_calls=(lost,))
            admission.settle(completion)
            yield completion

    def give_back(self) -> None:
        self.is_given_back.set()
