"""Every file operation and every engine call fails once: no row is lost or doubled, and no error is without a type.

A sample of the sweep, the same each time; `benchmarks/faults.py --sweep` takes all of it.
"""

import logging
import shutil
from pathlib import Path

import pytest

from moebeam.jobs.run.launch import launch
from tests.support.disturbances.disturbed_runs import Tables, Work, problems_of, tables_of
from tests.support.disturbances.faulty_storage import Fault, faults_of, operations_of, outcome_of

pytestmark = pytest.mark.integration

NUM_SAMPLES = 20


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> tuple[Work, Tables, list[Fault]]:
    work = Work(tmp_path_factory.mktemp("swept"), tiny_checkpoint, 40, max_shard_rows=20).write()
    output = work.folder / "undisturbed"
    launch(work.job(output))
    undisturbed = tables_of(output)
    assert problems_of(output, work, undisturbed) == []
    return work, undisturbed, faults_of(operations_of(work))


@pytest.mark.parametrize("sample", range(NUM_SAMPLES))
def test_a_run_survives_any_one_fault_or_says_why_not_and_is_finished_by_the_next(
    swept: tuple[Work, Tables, list[Fault]], sample: int, caplog: pytest.LogCaptureFixture
) -> None:
    work, undisturbed, faults = swept
    fault = faults[sample * len(faults) // NUM_SAMPLES]
    output = work.folder / f"out-{sample}"
    with caplog.at_level(logging.CRITICAL + 1):
        outcome = outcome_of(work, undisturbed, fault, output)
    assert outcome.problems == (), f"{fault.operation} {fault.kind}: the first run ended with {outcome.first}"
    shutil.rmtree(output, ignore_errors=True)


def test_the_sweep_reaches_every_kind_of_operation(swept: tuple[Work, Tables, list[Fault]]) -> None:
    names = {fault.operation.name for fault in swept[2]}
    assert {"open_input", "write_whole", "create_exclusive", "copy_whole", "remove_tree", "generate"} <= names
    assert len(swept[2]) > 500
