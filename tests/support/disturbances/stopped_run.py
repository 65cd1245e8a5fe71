"""A small planned run that is answered and published without Beam, and that dies at any write to its store.

It is planned once by a real run; each copy begins with the plan alone.
"""

import contextlib
import json
import random
import shutil
import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

from moebeam.jobs.check.preflight import check_job
from moebeam.jobs.run.launch import launch
from moebeam.jobs.run.main_job import make_main_job
from moebeam.model_runner.protocol import ModelRunner
from moebeam.schemas.errors import ContentRefused, RequestGivenUp
from moebeam.schemas.job.sections import Job
from moebeam.schemas.records import Completion, LostCall, Request, Usage
from moebeam.schemas.store import storage
from moebeam.schemas.store.appended_file import AppendedFile
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.answer_shard import AnswerSpec, LoadedEngine, answer_shard
from moebeam.transforms.answer.waste import record_unused
from moebeam.transforms.durable.commit import read_commit, read_commits
from moebeam.transforms.durable.journal_file import JournalWriter, read_journal
from moebeam.transforms.durable.journal_lines import Entry
from moebeam.transforms.plan.plan_record import read_plan
from moebeam.transforms.plan.sorted_runs import read_rows
from moebeam.transforms.publish.invariants import RowSums, sum_shard
from moebeam.transforms.publish.manifest import RunAccounts, publish_shard, write_manifest
from moebeam.transforms.publish.publish_spec import PublishSpec
from moebeam.transforms.publish.rollup import (
    DEFAULT_BY,
    MAX_GROUPS,
    largest_groups,
    merge_groups,
    read_committed_ledger,
    roll_up,
)
from tests.support.jobs.jobs_for_tests import fake_job, priced, write_parquet

NUM_ROWS, MAX_SHARD_ROWS = 24, 6
BROKEN, REFUSED = 5, 7
"""Every row whose number these divide first gets an answer that is no JSON, or a refusal that costs tokens."""

WRITES = ("write_whole", "write_note", "create_exclusive", "copy_whole", "remove_files", "remove_tree")
LOST_AT = datetime(2026, 7, 1, tzinfo=UTC)


class Killed(BaseException):
    """The process is gone: nothing catches this, and no write comes after it."""


class Crashed(Exception):
    """The engine broke; what had arrived is kept."""


@dataclass
class Engine:
    """Answers by the row's text; breaks after so many answers, if told. Stands for `fake`, which plans prefixes."""

    num_left: int | None = None
    num_asked: int = 0

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for request in requests:
            if request.earlier is not None:
                yield request.earlier
                continue
            if self.num_left is not None and self.num_asked >= self.num_left:
                raise Crashed("the engine broke")
            self.num_asked += 1
            yield self.answer(request)

    def answer(self, request: Request) -> Completion:
        told = "".join(message.content for message in request.messages)
        row = int(told.split("row ")[1].split(";")[0])
        usage = Usage(100 + row, 7 + row % 3, cached_tokens=row, reasoning_tokens=row % 4)
        is_broken = row % BROKEN == 0 and request.attempt == 1
        text = "no json" if is_broken else '{"category": "fine"}'
        refusal = ContentRefused("the provider refuses") if row % REFUSED == 0 else None
        lost = (lost_call(row),) if row % 4 == 0 else ()
        finish = "stop" if refusal is None else "content_filter"
        at = datetime(2026, 7, 2, tzinfo=UTC)
        return Completion(
            request.request_id, text, finish, usage, at, 3.0, "fake", "tiny", "r", error=refusal, lost_calls=lost
        )


def lost_call(row: int) -> LostCall:
    return LostCall("fake", "tiny", "engine_timeout", LOST_AT, 90 + row, 64)


def tickets_job(folder: Path, output: Path, checkpoint: Path) -> Job:
    """The job, whose answers are journaled though they cost nothing but time."""
    schema = folder / "schema.json"
    schema.write_text(json.dumps({"type": "object", "required": ["category"]}))
    return fake_job(
        folder / "in.parquet",
        output,
        checkpoint,
        input={"tenant_column": "tenant"},
        prompt={"template": "row {{ n }}; {{ text }}"},
        output={"schema": str(schema), "max_reject_share": 1.0},
        accounting=priced(folder),
        failures={"journal": "always"},
        plan={"max_shard_rows": MAX_SHARD_ROWS},
        repair={"max_attempts": 2},
    )


@dataclass
class PlannedRun:
    """A run in a folder of its own, at its plan or further."""

    output: Path
    job: Job
    answer: AnswerSpec
    publish: PublishSpec
    _kill_in: int | None = field(default=None, init=False)

    @classmethod
    def plan(cls, folder: Path, checkpoint: Path, num_rows: int = NUM_ROWS) -> "PlannedRun":
        """Run to the end once: its plan is kept."""
        rows = range(num_rows)
        columns: dict[str, Any] = {
            "n": [row if row % 8 != 3 else row - 1 for row in rows],
            "text": ["the same words" for _ in rows],
            "tenant": [("acme", "zeta")[row // 2 % 2] for row in rows],
        }
        write_parquet(folder / "in.parquet", columns)
        output = folder / "planned"
        job = tickets_job(folder, output, checkpoint)
        launch(job)
        for path in output.iterdir():
            if path.name != "_moebeam":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in ("commits", "journal", "progress", "wasted"):
            shutil.rmtree(output / "_moebeam" / name, ignore_errors=True)
        return cls.open(output, job)

    @classmethod
    def open(cls, output: Path, job: Job) -> "PlannedRun":
        main = make_main_job(check_job(job), read_plan(RunLayout(str(output))))
        return cls(output, job, main.answer, main.publish)

    def copy(self, output: Path) -> "PlannedRun":
        """The same run, as it stands, in another folder."""
        shutil.copytree(self.output, output)
        layout = RunLayout(str(output))
        job = self.job.model_copy(update={"output": self.job.output.model_copy(update={"path": str(output)})})
        answer, publish = replace(self.answer, layout=layout), replace(self.publish, layout=layout)
        return PlannedRun(output, job, answer, publish)

    @property
    def layout(self) -> RunLayout:
        return self.answer.layout

    @property
    def shards(self) -> list[str]:
        plan = read_plan(self.layout)
        assert plan is not None
        return [shard.shard for shard in plan.shards]

    def launch(self, engine: ModelRunner, encoder: Any, *, kill_at: int | None = None) -> str:
        """One attempt: answer what is left, publish. Says how it ended: `done`, `crashed` or `killed`."""
        with self._killed_at(kill_at):
            try:
                self._answer(LoadedEngine(engine, encoder))
                self._publish()
                return "done"
            except Crashed:
                return "crashed"
            except Killed:
                return "killed"

    def stop(self, engine: ModelRunner, encoder: Any, *, kill_at: int | None = None) -> str:
        """As `launch`, but what a crash leaves is published, as at a stop."""
        with self._killed_at(kill_at):
            try:
                with contextlib.suppress(Crashed):
                    self._answer(LoadedEngine(engine, encoder))
                self._publish()
                return "stopped"
            except Killed:
                return "killed"

    def _answer(self, engine: LoadedEngine) -> None:
        for shard in self.shards:
            if read_commit(self.layout, shard) is None:
                answer_shard(shard, read_rows(self.layout.shard_plan(shard)), engine, self.answer)

    def _publish(self) -> None:
        """What *publish* does, in one process."""
        spec = self.publish
        commits = [*read_commits(spec.layout).values()]
        num_journal_bytes = 0
        for commit in commits:
            publish_shard(commit, spec.layout)
            assert spec.accounting is not None
            num_journal_bytes += record_unused(spec.layout, commit, spec.accounting)
        ledgers = (read_committed_ledger(spec.layout, commit) for commit in commits)
        groups = merge_groups(roll_up(ledger, DEFAULT_BY) for ledger in ledgers if ledger is not None)
        rows = sum((sums for commit in commits for sums in sum_shard(commit, spec.layout)), RowSums())
        accounts = RunAccounts(largest_groups(groups.items(), DEFAULT_BY, MAX_GROUPS), rows)
        write_manifest(commits, spec, accounts, num_journal_bytes=num_journal_bytes)

    @contextlib.contextmanager
    def _killed_at(self, kill_at: int | None) -> Generator[None]:
        """Raise `Killed` at the write of that number and at each one after it."""
        count = 0

        def dies(real: Any) -> Any:
            def write(*args: Any) -> Any:
                nonlocal count
                count += 1
                if kill_at is not None and count >= kill_at:
                    raise Killed if threading.current_thread() is threading.main_thread() else OSError("killed")
                return real(*args)

            return write

        with contextlib.ExitStack() as stack:
            for name in WRITES:
                stack.enter_context(patch.object(storage, name, dies(getattr(storage, name))))
            stack.enter_context(patch.object(AppendedFile, "write", dies(AppendedFile.write)))
            yield

    def entries(self) -> list[Entry]:
        """Everything that is journaled, committed or not."""
        return [entry for shard in self.shards for entry in read_journal(self.layout, shard).entries]

    def journal_again(self, dice: random.Random) -> None:
        """What a second attempt at the same shard leaves: the same answers, paid again."""
        shard = dice.choice(self.shards)
        kept = [entry for entry in read_journal(self.layout, shard).entries if entry.is_answer]
        self._append(shard, dice.sample(kept, min(2, len(kept))))

    def give_up(self, dice: random.Random) -> None:
        """What a stop leaves of requests in flight: their lost calls."""
        shard = dice.choice(self.shards)
        for entry in read_journal(self.layout, shard).entries[:1]:
            lost = Completion.from_error(
                entry.completion.request_id, RequestGivenUp("stopped"), lost_calls=(lost_call(dice.randrange(9)),)
            )
            self._append(shard, [replace(entry, completion=lost)])

    def damage(self, dice: random.Random) -> None:
        """Half a line, and one that nobody can read."""
        for path in dice.sample(sorted((self.output / "_moebeam" / "journal").rglob("*.jsonl")), 1):
            with path.open("ab") as file:
                file.write(b"00000000 {}\n1234")

    def _append(self, shard: str, entries: Iterable[Entry]) -> None:
        writer = JournalWriter(self.layout, shard)
        for entry in entries:
            writer.append(entry.key, entry.attempt, entry.completion)
        writer.close()
