"""A table that cannot take a run is refused before the run."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from moebeam.jobs.check.output_table import check_output_table
from moebeam.jobs.output.run_record import RunRequest
from moebeam.schemas import extras
from moebeam.schemas.errors import JobFileError, MissingExtra, OutputError
from tests.support.jobs.jobs_for_tests import fake_job
from tests.support.jobs.published_runs import make_catalog, make_url, publish_run


def _check(tmp_path: Path, schema: pa.Schema, run_id: str = "new", **output: Any) -> tuple[str, ...]:
    section = {"path": str(tmp_path / "out"), **output}
    job = fake_job(tmp_path / "in.parquet", tmp_path / "out", tmp_path, output=section)
    return check_output_table(RunRequest(job), schema, run_id)


@pytest.mark.parametrize("kind", ["iceberg", "delta"])
def test_a_column_of_another_type_and_a_run_that_is_there_already_are_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_catalog(tmp_path / "catalog", monkeypatch)
    url, run = make_url(kind, tmp_path), publish_run(tmp_path / "r1", "r1", {"tenant": ["a"]})
    assert _check(tmp_path, run.schema, table=url) == ()
    run.commit(url)
    assert _check(tmp_path, run.schema, table=url, replace_where="tenant") == ()
    changed = run.schema.set(len(run.schema) - 1, pa.field("tenant", pa.int64()))
    with pytest.raises(OutputError, match=r"column 'tenant': expected int64.*found string"):
        _check(tmp_path, changed, table=url)
    with pytest.raises(OutputError, match="found run r1 in it already"):
        _check(tmp_path, run.schema, "r1", table=url)
    with pytest.raises(OutputError, match=r"replace_where: expected a column of the results"):
        _check(tmp_path, run.schema, table=url, replace_where="customer")


def test_a_catalog_that_is_not_configured_or_lacks_the_namespace_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = publish_run(tmp_path / "r1", "r1", {"tenant": ["a"]}).schema
    make_catalog(tmp_path / "catalog", monkeypatch)
    with pytest.raises(OutputError, match=r"iceberg://nowhere/db.t.*cannot be reached"):
        _check(tmp_path, schema, table="iceberg://nowhere/db.t")
    with pytest.raises(OutputError, match="expected the namespace 'missing'"):
        _check(tmp_path, schema, table="iceberg://local/missing.t")


def test_a_missing_library_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'moebeam\[delta\]'"):
        _check(tmp_path, pa.schema([("a", pa.string())]), table=f"delta://{tmp_path}/t")


def test_instants_of_nanoseconds_are_warned_of(tmp_path: Path) -> None:
    schema = pa.schema([("at", pa.timestamp("ns"))])
    assert "'at' are cut" in _check(tmp_path, schema, table=f"delta://{tmp_path}/t")[0]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"table": "iceberg://prod/reviews"}, r"\[output\] table.*expected iceberg://CATALOG/NAMESPACE.TABLE"),
        ({"table": "s3://lake/reviews"}, r"\[output\] table.*expected iceberg://"),
        ({"replace_where": "tenant"}, r"\[output\].*expected `table` beside it"),
    ],
)
def test_a_table_that_no_url_names_is_refused(tmp_path: Path, output: dict[str, str], message: str) -> None:
    with pytest.raises(JobFileError, match=message):
        fake_job(tmp_path / "in", tmp_path / "out", tmp_path, output={"path": str(tmp_path), **output})
