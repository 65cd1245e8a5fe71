import json
import os
import tomllib
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.jobs.check.job_file import load_job
from moebeam.schemas.errors import JobFileError

MINIMAL = """
[input]
path = "data/*.parquet"
[output]
path = "out"
"""


def write(folder: Path, text: str) -> str:
    path = folder / "job.toml"
    path.write_bytes(text.encode())
    return str(path)


def problem(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(JobFileError) as raised:
        load_job(write(folder, text), overrides)
    assert raised.value.exit_code == 2
    return str(raised.value)


def test_paths_in_the_file_are_relative_to_its_folder_wherever_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "jobs"
    folder.mkdir()
    model = '[model]\nengine = "fake"\npath = "m/"\nscript = "./f.json"\n[accounting]\nprice_book = "p.csv"'
    write(folder, MINIMAL + f'schema = "../s.json"\n{model}')
    monkeypatch.chdir(tmp_path)
    job = load_job("jobs/job.toml")
    assert job.input.path == f"{folder}/data/*.parquet"
    assert job.output.path == f"{folder}/out"
    assert job.output.schema_ == f"{tmp_path}/s.json"
    assert (job.model.path, job.model.script) == (f"{folder}/m", f"{folder}/f.json")
    assert job.accounting.price_book == f"{folder}/p.csv"


def test_paths_in_set_are_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "jobs"
    folder.mkdir()
    path = write(folder, MINIMAL)
    monkeypatch.chdir(tmp_path)
    job = load_job(path, ["output.path=here", "output.schema=s.json", "input={path='in.parquet'}"])
    assert job.output.path == f"{tmp_path}/here"
    assert job.output.schema_ == f"{tmp_path}/s.json"
    assert job.input.path == f"{tmp_path}/in.parquet"


@pytest.mark.parametrize("kept", ["s3://bucket/a/../b.parquet", "gs://bucket/x", "memory://x/y", "/absolute/x.parquet"])
def test_urls_and_absolute_paths_stay_as_they_are(tmp_path: Path, kept: str):
    assert load_job(write(tmp_path, MINIMAL), [f"input.path={kept}"]).input.path == kept


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/somewhere")
    job = load_job(write(tmp_path, MINIMAL.replace("data/", "~/data/")), ["output.path=~/out"])
    assert (job.input.path, job.output.path) == ("/somewhere/data/*.parquet", "/somewhere/out")


def test_a_pydantic_class_as_schema_is_not_taken_for_a_path(tmp_path: Path):
    job = load_job(write(tmp_path, MINIMAL + 'schema = "my_shop.tickets:Ticket"'))
    assert job.output.schema_ == "my_shop.tickets:Ticket"
    job = load_job(write(tmp_path, MINIMAL), ["output.schema=tickets:Ticket"])
    assert job.output.schema_ == "tickets:Ticket"


def test_a_job_file_on_an_object_store_has_its_folder_there():
    with fsspec.open("memory://shop/jobs/job.toml", "wb") as sink:
        sink.write(MINIMAL.encode())
    job = load_job("memory://shop/jobs/job.toml", ["output.path=/local/out"])
    assert job.input.path == "memory://shop/jobs/data/*.parquet"
    assert job.output.path == "/local/out"


def test_a_missing_job_file_and_a_folder_are_told_apart(tmp_path: Path):
    with pytest.raises(JobFileError, match="there is no such job file"):
        load_job(str(tmp_path / "job.toml"))
    with pytest.raises(JobFileError, match="is a folder"):
        load_job(str(tmp_path))
    with pytest.raises(JobFileError, match="there is no such job file"):
        load_job("memory://nowhere/job.toml")
    with pytest.raises(JobFileError, match="cannot be read"):
        load_job("no-such-store://x/job.toml")


def test_a_toml_error_names_file_line_and_column(tmp_path: Path):
    message = problem(tmp_path, '[input]\npath = "a"\nid_column "x"\n')
    assert message.startswith(f"{tmp_path}/job.toml, line 3, column 11: not TOML: ")
    assert 'id_column "x"' in message
    assert "at its end" in problem(tmp_path, '[input]\npath = """a')


def test_a_job_file_that_is_not_utf_8_names_the_line(tmp_path: Path):
    (tmp_path / "job.toml").write_bytes(b'[input]\npath = "caf\xe9"')
    with pytest.raises(JobFileError, match="line 2: a job file is UTF-8; found byte 0xe9"):
        load_job(str(tmp_path / "job.toml"))


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path):
    (tmp_path / "job.toml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_job(str(tmp_path / "job.toml")).output.path == f"{tmp_path}/out"


def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path: Path):
    message = problem(tmp_path, MINIMAL + "[sampling]\ntempurature = 0.1")
    assert message == "job.toml: [sampling] tempurature: unknown key; did you mean 'temperature'?"


def test_a_key_in_the_wrong_section_is_sent_to_the_right_one(tmp_path: Path):
    assert "it belongs in [sampling]" in problem(tmp_path, MINIMAL + "[model]\ntemperature = 0.1")
    assert "unknown key outside a section; it belongs in [sampling]" in problem(tmp_path, "temperature = 0.1" + MINIMAL)


def test_a_key_like_no_other_gets_the_list_of_keys(tmp_path: Path):
    message = problem(tmp_path, MINIMAL + "[plan]\nzzz = 1")
    assert "[plan] zzz: unknown key; [plan] has max_shard_tokens, max_shard_rows, merge" in message


def test_an_unknown_section_is_refused_with_the_nearest_one(tmp_path: Path):
    message = problem(tmp_path, MINIMAL + "[modle]\npath = 'm'")
    assert message == "job.toml: [modle]: unknown section; did you mean [model]?"
    assert "unknown section; there are [input], [prompt]" in problem(tmp_path, MINIMAL + "[zzz]")


def test_the_python_name_of_an_aliased_key_is_no_key(tmp_path: Path):
    assert "[output] schema_: unknown key; did you mean 'schema'?" in problem(tmp_path, MINIMAL + "schema_ = 's.json'")


def test_every_problem_is_reported_at_once(tmp_path: Path):
    message = problem(
        tmp_path,
        "[inptu]\n[output]\nschema = 3\n[sampling]\nmax_tokens = 0\ntopp = 1.0",
        "model.dtype=int3",
        "nonsense",
    )
    first, *lines = message.splitlines()
    assert first == "8 problems in the job"
    assert sorted(line.strip() for line in lines) == [
        "--set model.dtype: expected 'auto', 'float32' or 'bfloat16', found \"int3\"",
        "--set nonsense: expected section.key=value, for example sampling.max_tokens=256",
        "job.toml: [inptu]: unknown section; did you mean [input]?",
        "job.toml: [input]: the section is missing; it needs at least path",
        "job.toml: [output] path: missing (folder of the run; it belongs to this job alone)",
        "job.toml: [output] schema: expected a string, found 3",
        "job.toml: [sampling] max_tokens: expected more than 0, found 0",
        "job.toml: [sampling] topp: unknown key; did you mean 'top_p'?",
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('max_tokens = "5"', 'expected a whole number, found "5"'),
        ("max_tokens = 1.5", "expected a whole number, found 1.5"),
        ("max_tokens = true", "expected a whole number, found true"),
        ("temperature = true", "expected a number, found true"),
        ("temperature = 2.5", "expected at most 2, found 2.5"),
        ("temperature = nan", "found NaN"),
        ("temperature = 2024-01-01", "put it in quotes"),
        ("stop = ['a', 2024-01-01, 10:00:00]", "put it in quotes"),
        ("seed = {a = 2024-01-01}", "put it in quotes"),
        ('stop = "x"', 'expected an array, found "x"'),
        ("stop = [1]", "expected an array of strings, found 1"),
        ("seed = {a = 1}", "expected a whole number, found a section"),
    ],
)
def test_a_wrong_type_is_told_with_expected_and_found(tmp_path: Path, line: str, expected: str):
    message = problem(tmp_path, MINIMAL + f"[sampling]\n{line}")
    assert message.startswith(f"job.toml: [sampling] {line.split()[0]}: ")
    assert expected in message
    assert len(message.splitlines()) == 1


def test_a_key_with_two_allowed_types_names_both(tmp_path: Path):
    message = problem(tmp_path, MINIMAL.replace("[output]", "passthrough = 3\n[output]"))
    assert message == "job.toml: [input] passthrough: expected an array or 'all', found 3"


def test_a_section_that_is_a_value_is_refused(tmp_path: Path):
    assert problem(tmp_path, "model = 3" + MINIMAL) == "job.toml: [model]: expected a section, found 3"
    assert "gives [model] a single value" in problem(tmp_path, "model = 3" + MINIMAL, "model.path=x")


def test_rules_between_keys_are_told_in_their_own_words(tmp_path: Path):
    message = problem(tmp_path, MINIMAL + '[prompt]\ntemplate = "x"\nmessages_column = "m"')
    assert message == "job.toml: [prompt]: `messages_column` brings whole chats: leave out `template` and `system`"


def test_an_empty_path_is_refused_instead_of_meaning_the_folder(tmp_path: Path):
    assert "[model] path: is empty" in problem(tmp_path, MINIMAL + '[model]\npath = ""')
    assert 'expected a path, found ""' in problem(tmp_path, MINIMAL, "output.path=")


def test_set_wins_over_the_file_and_the_last_set_wins(tmp_path: Path):
    job = load_job(
        write(tmp_path, MINIMAL + "[sampling]\nmax_tokens = 1\nseed = 4"),
        ["sampling.max_tokens=2", "sampling.max_tokens=3", "sampling.stop=['a', 'b']", "model.name=four"],
    )
    assert (job.sampling.max_tokens, job.sampling.seed, job.sampling.stop) == (3, 4, ("a", "b"))
    assert job.model.name == "four"


def test_set_keeps_equal_signs_of_its_value(tmp_path: Path):
    assert load_job(write(tmp_path, MINIMAL), ["prompt.system=a=b = c"]).prompt.system == "a=b = c"


@pytest.mark.parametrize("text", ["1 # more", "1,", "1\nseed = 2", "[1", "# x", "a, b"])
def test_set_takes_text_that_is_no_single_toml_value_as_a_string(tmp_path: Path, text: str):
    assert load_job(write(tmp_path, MINIMAL), [f"prompt.template={text}"]).prompt.template == text


def test_set_says_how_to_write_a_string_that_looks_like_a_number(tmp_path: Path):
    message = problem(tmp_path, MINIMAL, "model.name=4")
    assert message == """--set model.name: expected a string, found 4; for a string write --set 'model.name="4"'"""
    assert load_job(write(tmp_path, MINIMAL), ['model.name="4"']).model.name == "4"


@pytest.mark.parametrize(
    "override", ["sampling.tempurature=1", "samplin.temperature=1", "a.b.c=1", "sampling.stop.x=1"]
)
def test_an_unknown_key_in_set_is_refused_as_such(tmp_path: Path, override: str):
    assert problem(tmp_path, MINIMAL, override).startswith(f"--set {override.partition('=')[0]}: ")


@pytest.mark.parametrize("override", ["", "=", "a", "a b=1", "=1", "a..b=1", ".a=1"])
def test_an_ill_formed_set_is_refused(tmp_path: Path, override: str):
    assert "expected section.key=value" in problem(tmp_path, MINIMAL, override)


@given(st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.text(st.characters(codec="utf-8"), min_size=1)))
def test_any_value_survives_set_when_written_as_toml(tmp_path_factory: pytest.TempPathFactory, value: bool | int | str):
    path = write(tmp_path_factory.getbasetemp(), MINIMAL)
    text = json.dumps(value)
    try:
        tomllib.loads(f"a = {text}")
    except tomllib.TOMLDecodeError:  # JSON allows some escapes that TOML does not
        return
    if isinstance(value, str):
        assert load_job(path, [f"prompt.system={text}"]).prompt.system == value
    elif isinstance(value, bool):
        with pytest.raises(JobFileError, match="expected a whole number"):
            load_job(path, [f"sampling.seed={text}"])
    else:
        assert load_job(path, [f"sampling.seed={text}"]).sampling.seed == value


def test_a_set_value_that_is_not_utf_8_is_refused(tmp_path: Path):
    assert "is not UTF-8" in problem(tmp_path, MINIMAL, "model.name=caf\udce9")


def test_an_unreadable_job_file_is_a_job_file_error(tmp_path: Path):
    path = write(tmp_path, MINIMAL)
    with pytest.raises(JobFileError, match="cannot be read"):
        load_job(f"{path}/x")
    if os.geteuid() != 0:
        os.chmod(path, 0)
        with pytest.raises(JobFileError, match="cannot be read"):
            load_job(path)
