"""A provider that fails everybody for a while, and single calls, changes nothing in the tables of a run."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.endpoint_chaos.checks import read_rows
from benchmarks.endpoint_chaos.job_files import write_job_file, write_questions
from benchmarks.endpoint_chaos.questions import find_answer, lacks_usage
from benchmarks.endpoint_chaos.script import Phase, undisturbed_script
from benchmarks.endpoint_chaos.server import ScriptedProvider
from benchmarks.endpoint_chaos.views import find_differences, read_views
from moebeam.jobs.check.job_file import load_job
from moebeam.jobs.run.launch import launch
from tests.support.jobs.remote_jobs import KEY, KEY_VARIABLE

NUM_ROWS = 64
"""More than the phases need: on a busy machine many answers come before a phase begins."""

PHASES = (
    Phase("closed_port", 4, 0.4),
    Phase("overloaded", 8, 0.3),
    Phase("truncated", 12, 0.0, num_calls=4, share=0.5),
    Phase("no_credit", 18, 0.2),
    Phase("resets", 20, 0.0, num_calls=4, share=0.5),
    Phase("server_errors", 24, 0.3),
    Phase("no_such_path", 28, 0.2),
)


def test_outages_and_broken_answers_of_a_provider_reject_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    script = replace(undisturbed_script(NUM_ROWS, has_refusals=False, may_lack_usage=True), phases=PHASES)
    write_questions(tmp_path, NUM_ROWS)
    with ScriptedProvider(tmp_path, script, 0) as provider:
        model = {"max_concurrency": 4, "max_retries": 3}
        summary = launch(load_job(str(write_job_file(tmp_path, provider.endpoint.base_url, model=model)), ()))
    assert (summary.num_results, summary.num_rejects, summary.exit_code) == (NUM_ROWS, 0, 0)
    for number, row in read_rows(tmp_path / "out").items():
        answer = find_answer(number, may_lack_usage=True)
        tokens = None if lacks_usage(number) else answer["usage"]["completion_tokens"]
        assert row["output_text"] == answer["choices"][0]["message"]["content"]
        assert (row["completion_tokens"], row["finish_reason"]) == (tokens, "stop")
    assert provider.kinds_met == [phase.kind for phase in PHASES]
    assert find_differences(read_views(tmp_path, tmp_path / "out", summary.to_json())) == []
