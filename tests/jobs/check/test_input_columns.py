"""Columns that a job names: found under any name, passed through under any other, and clashes named with their mend."""

import tomllib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from moebeam.jobs.check.input_columns import choose_columns, find_column_problems, list_needed_columns
from moebeam.jobs.check.job_file import load_job, read_job
from moebeam.jobs.check.preflight import check_job
from moebeam.schemas.errors import InputPatternError, JobFileError
from moebeam.schemas.job.sections import Job
from moebeam.transforms.read.input_rows import ReadColumns
from moebeam.transforms.read.input_scan import scan_input
from moebeam.transforms.render.prompt_template import PromptTemplate
from tests.support.jobs.jobs_for_tests import fake_job, write_parquet

COLUMNS = {"review id": ["r"], "review.text": ["good"], "model": ["m"], "cost": [1.5], "team": ["a"]}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_parquet(tmp_path / "in.parquet", COLUMNS)


def make_job(source: Path, template: str = "x", **sections: Any) -> Job:
    return fake_job(source, source.parent / "out", source.parent / "c", prompt={"template": template}, **sections)


def find_problems(job: Job) -> list[str]:
    template = PromptTemplate(job.prompt)
    scan = scan_input(job.input, needed=list_needed_columns(job, template))
    return [str(problem) for problem in find_column_problems(job, scan, template)]


def choose(job: Job) -> ReadColumns:
    template = PromptTemplate(job.prompt)
    return choose_columns(job, scan_input(job.input, needed=list_needed_columns(job, template)), template)


@pytest.mark.parametrize(
    ("passthrough", "expected"),
    [
        ([], {}),
        (["review id"], {"review id": "review id"}),
        ({"prefix": "in_"}, {name: f"in_{name}" for name in COLUMNS}),
        ({"columns": ["model"], "prefix": "in_"}, {"model": "in_model"}),
        ({"columns": ["model", "team"], "rename": {"model": "their model"}}, {"model": "their model", "team": "team"}),
        (
            {"columns": ["model", "cost"], "rename": {"model": "their_model"}, "prefix": "x"},
            {"model": "their_model", "cost": "xcost"},
        ),
    ],
)
def test_passthrough_columns_have_the_names_that_the_job_gives_them(
    source: Path, passthrough: Any, expected: dict[str, str]
) -> None:
    job = make_job(source, input={"passthrough": passthrough})
    assert find_problems(job) == []
    columns = choose(job)
    assert (
        dict(zip((f.name for f in columns.passthrough), (f.name for f in columns.output_fields), strict=True))
        == expected
    )


def test_a_clash_with_output_columns_is_told_with_the_lines_that_mend_it(source: Path) -> None:
    (problem,) = find_problems(make_job(source, input={"passthrough": ["model", "team", "cost"]}))
    assert "columns 'model', 'cost' would have the name of an output column (case ignored)" in problem
    for line in problem.partition("; write ")[2].split(", or "):
        mended = tomllib.loads(line)
        assert find_problems(make_job(source, input=mended)) == []


def test_two_columns_cannot_have_one_name(source: Path) -> None:
    (problem,) = find_problems(make_job(source, input={"passthrough": {"rename": {"model": "TEAM", "cost": "c"}}}))
    assert "found 'TEAM' for both" not in problem
    assert "found 'team' for both 'model' and 'team'" in problem


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"rename": {"modle": "m"}, "prefix": "p"}, "has no column 'modle'; did you mean 'model'?"),
        (
            {"columns": ["team"], "rename": {"model": "m"}},
            "rename: expected a column that is passed through, found 'model'",
        ),
    ],
)
def test_a_rename_of_nothing_is_refused(source: Path, section: Any, expected: str) -> None:
    (problem,) = find_problems(make_job(source, input={"passthrough": section}))
    assert expected in problem


def test_a_template_is_told_how_to_write_a_name_that_is_no_variable(source: Path) -> None:
    (problem,) = find_problems(make_job(source, "{{ review }}"))
    assert problem.endswith("has no column 'review'; did you mean row[\"review id\"]?")
    assert find_problems(make_job(source, '{{ row["review id"] }}')) == []
    (problem,) = find_problems(make_job(source, '{{ row["review.txt"] }}'))
    assert problem.endswith('did you mean row["review.text"]?')


def test_only_the_columns_that_a_template_reads_are_read(source: Path) -> None:
    assert [f.name for f in choose(make_job(source, '{{ row["review id"] }}{{ team }}')).input_fields] == [
        "review id",
        "team",
    ]
    assert len(choose(make_job(source, "{{ row | tojson }}")).input_fields) == len(COLUMNS)


def test_an_input_of_which_no_file_can_be_read_is_refused_by_the_check(source: Path, tiny_checkpoint: Path) -> None:
    source.write_bytes(b"PAR1 cut short")
    job = fake_job(source, source.parent / "out", tiny_checkpoint)
    with pytest.raises(
        InputPatternError, match=r"1 of 1 files cannot be read: .*in\.parquet: .*it may have been cut short"
    ):
        check_job(job).check_readable()
    write_parquet(source.parent / "b.parquet", {"text": ["a"]})
    check_job(fake_job(source.parent / "*.parquet", source.parent / "out", tiny_checkpoint)).check_readable()


def test_paths_may_be_several_and_each_is_relative_to_the_job_file(tmp_path: Path) -> None:
    text = '[input]\npath = ["a", "s3://b/c", "/d/*.parquet"]\n[output]\npath = "out"\n'
    (tmp_path / "job.toml").write_text(text)
    job = load_job(str(tmp_path / "job.toml"))
    assert job.input.paths == (f"{tmp_path}/a", "s3://b/c", "/d/*.parquet")
    job = load_job(str(tmp_path / "job.toml"), ['input.path=["/x", "/y"]', 'input.passthrough={prefix="in_"}'])
    assert (job.input.paths, job.input.passthrough.name_output("a")) == (("/x", "/y"), "in_a")
    assert read_job(job.model_dump(mode="json", by_alias=True)).input == job.input


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('passthrough = { prefx = "in_" }', "[input] passthrough: prefx: unknown key"),
        ("passthrough = [1]", "[input] passthrough: expected an array of strings or 'all', found 1"),
        ('passthrough = "some"', "[input] passthrough: expected an array or 'all', found \"some\""),
        ("path = []", "[input] path: expected"),
    ],
)
def test_a_wrong_value_is_told_by_its_key(tmp_path: Path, line: str, expected: str) -> None:
    path = "" if line.startswith("path") else 'path = "a"\n'
    (tmp_path / "job.toml").write_text(f'[input]\n{path}{line}\n[output]\npath = "out"\n')
    with pytest.raises(JobFileError) as error:
        load_job(str(tmp_path / "job.toml"))
    assert expected in str(error.value)


def test_an_extension_column_may_be_renamed(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in.parquet", {"id": pa.array([b"0" * 16], pa.uuid())})
    (field,) = choose(make_job(tmp_path / "in.parquet", input={"passthrough": {"prefix": "in_"}})).output_fields
    assert field.name == "in_id"
