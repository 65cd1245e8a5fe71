"""kill -9 of remote runs whose output lies on S3: what the journal holds there is not asked again, and no row is lost.

An object store cannot append, so a killed process also loses the answers of the last second, which no object holds yet.
`MOEBEAM_S3_KILLS` says how many kills.
"""

import json
import os
import random
import time
from decimal import Decimal
from pathlib import Path

import pytest

from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable.commit import read_commit
from moebeam.transforms.durable.journal_file import read_journal
from tests.support.disturbances.disturbed_runs import tables_of
from tests.support.disturbances.killed_runs import RUN_TIMEOUT_S, kill, run_to_end, start
from tests.support.jobs.jobs_for_tests import read_table, write_job_file
from tests.support.jobs.remote_jobs import KEY, KEY_VARIABLE, Answers, remote_job, write_tickets
from tests.support.servers.fake_endpoint import FakeEndpoint
from tests.support.servers.s3_server import S3Server

pytestmark = pytest.mark.integration

NUM_ROWS = 150
MAX_IN_FLIGHT = 6
BROKEN, REFUSED = frozenset(range(0, NUM_ROWS, 10)), frozenset(range(5, NUM_ROWS, 40))
NUM_CALLS = NUM_ROWS + len(BROKEN)
FIRST_PROMPT_TOKENS = 50
"""What `Answers` says of row 0 when it is asked first; each further row has one more."""


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)


def journaled_rows(s3: S3Server, url: str) -> set[int]:
    """The rows that are asked once, and whose answers are in the journal of a run and in no commit yet."""
    layout = RunLayout(url)
    folder = s3.path(layout.journal)
    found: set[int] = set()
    for shard in folder.iterdir() if folder.exists() else ():
        if read_commit(layout, shard.name) is not None:
            continue
        content = read_journal(layout, shard.name)
        assert content.num_damaged == 0
        first = (entry.completion.usage for entry in content.entries if entry.attempt == 1 and entry.is_answer)
        found |= {usage.prompt_tokens - FIRST_PROMPT_TOKENS for usage in first}
    return found - BROKEN - REFUSED


def seen_rows(s3: S3Server, url: str) -> set[int]:
    """As `journaled_rows`, of a run at work, whose files come and go."""
    try:
        return journaled_rows(s3, url)
    except (FileNotFoundError, AssertionError):
        return set()


def test_killed_runs_on_s3_lose_no_row_and_ask_nothing_again_that_is_journaled(
    tmp_path: Path, s3: S3Server, bucket: str
) -> None:
    dice, num_kills = random.Random(5), int(os.environ.get("MOEBEAM_S3_KILLS", "4"))
    write_tickets(tmp_path, NUM_ROWS)
    answers = Answers(BROKEN, REFUSED, delay_s=0.2)
    with FakeEndpoint(answers) as endpoint:

        def job_file(name: str) -> Path:
            sizes = {"plan": {"max_shard_rows": 60}, "model": {"max_concurrency": MAX_IN_FLIGHT}}
            job = remote_job(tmp_path, Path("unused"), endpoint, **sizes, output={"path": f"{bucket}/{name}"})
            return write_job_file(job, tmp_path / f"{name}.toml")

        assert run_to_end(job_file("undisturbed")) == 0
        undisturbed = tables_of(s3.path(f"{bucket}/undisturbed"))
        assert len(endpoint.calls) == NUM_CALLS
        answers.num_calls.clear()
        path, url, num_killed = job_file("out"), f"{bucket}/out", 0
        kept: dict[int, int] = {}
        for _ in range(num_kills):
            process = start(path)
            # As soon as some answers of this attempt are in the store, and some time after that.
            deadline = time.monotonic() + RUN_TIMEOUT_S
            while process.poll() is None and not seen_rows(s3, url) - kept.keys():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            time.sleep(dice.uniform(0.0, 0.4))
            if process.poll() is not None:
                break
            kill(process, "group")
            num_killed += 1
            left = {row: answers.num_calls[row] for row in journaled_rows(s3, url)}
            kept = left | kept
        assert num_killed > 1 and kept, "no kill came in time"
        assert run_to_end(path) == 0, path.with_suffix(".log").read_text()[-2000:]
        assert {row: answers.num_calls[row] for row in kept} == kept, "asked again what was journaled"
    output = s3.path(url)
    assert tables_of(output) == undisturbed
    ledger, manifest = read_table(output, "ledger"), json.loads((output / "manifest.json").read_text())
    total = sum((line["cost"] for line in ledger if line["outcome"] != "wasted"), Decimal(0))
    assert total == Decimal(manifest["totals"]["costs"]["USD"])
    references = [line["journal"] for line in ledger]
    assert None not in references and len({*references}) == len(references)
    assert sum(line["outcome"] == "answered" for line in ledger) == NUM_ROWS - len(REFUSED)
