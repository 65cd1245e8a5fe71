"""What users' data does to a job: every bad value is a named reject or a clear error, and no row is lost."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moebeam.jobs.run.launch import launch
from moebeam.schemas.errors import InputPatternError, JobFileError
from tests.support.jobs.jobs_for_tests import column, fake_job, read_table, run_fake_job, write_parquet, write_script

TEXTS = [f"ticket number {row}" for row in range(30)]


def rejected(output: Path) -> dict[str, tuple[str, str]]:
    """custom_id -> (error_type, error_message) of all rejects."""
    return {row["custom_id"]: (row["error_type"], row["error_message"]) for row in read_table(output, "rejects")}


def test_missing_input_is_refused_before_the_run(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(InputPatternError, match=r"nothing\.parquet.*expected at least one file, found none"):
        run_fake_job(tmp_path / "nothing.parquet", tmp_path / "out", tiny_checkpoint)
    assert not (tmp_path / "out").exists()


def test_broken_files_are_rejects_of_their_own_and_good_ones_are_read_whole(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    source = tmp_path / "in"
    write_parquet(source / "good.parquet", {"text": TEXTS})
    write_parquet(source / "truncated.parquet", {"text": TEXTS})
    content = (source / "truncated.parquet").read_bytes()
    (source / "truncated.parquet").write_bytes(content[: len(content) // 2])
    (source / "empty.parquet").write_bytes(b"")
    (source / "words.parquet").write_text("not a Parquet file at all")
    summary = run_fake_job(source, tmp_path / "out", tiny_checkpoint)
    assert (summary.exit_code, summary.num_results, summary.num_unreadable) == (3, 30, 3)
    rejects = read_table(tmp_path / "out", "rejects")
    assert column(rejects, "custom_id") == ["empty.parquet", "truncated.parquet", "words.parquet"]
    assert column(rejects, "scope") == ["file"] * 3
    assert column(rejects, "error_type") == ["unreadable_file"] * 3
    assert all("in/empty.parquet" in message for message in column(rejects, "error_message")[:1])


def test_a_broken_row_group_is_one_reject_and_the_others_are_answered(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": TEXTS}, row_group_size=10)
    chunk = pq.ParquetFile(source).metadata.row_group(1).column(0)
    content = bytearray(source.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start : start + 40] = b"\xff" * 40
    source.write_bytes(content)
    summary = run_fake_job(source, tmp_path / "out", tiny_checkpoint)
    (reject,) = read_table(tmp_path / "out", "rejects")
    assert (reject["scope"], reject["num_rows"], reject["error_type"]) == ("row_group", 10, "unreadable_row_group")
    assert "in.parquet: row group 1" in reject["error_message"]
    assert (summary.exit_code, summary.num_results, summary.rows_in) == (3, 20, 20)


def test_all_files_unreadable_ends_with_rejects_and_exit_code_3(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    summary = run_fake_job(tmp_path / "bad.parquet", tmp_path / "out", tiny_checkpoint)
    assert (summary.exit_code, summary.num_results, summary.num_unreadable) == (3, 0, 1)
    assert pq.read_table(tmp_path / "out" / "results").num_rows == 0


def test_zero_rows_give_typed_empty_tables_and_success(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": pa.array([], pa.string())})
    summary = run_fake_job(source, tmp_path / "out", tiny_checkpoint, input={"passthrough": ["text"]})
    assert (summary.exit_code, summary.rows_in) == (0, 0)
    for table in ("results", "rejects"):
        schema = pq.read_table(tmp_path / "out" / table).schema
        assert schema.field("cost").type == pa.decimal128(38, 12)
        assert schema.field("text").type == pa.string()
    assert pq.read_table(tmp_path / "out" / "ledger").schema.field("started_at").type == pa.timestamp("us", tz="UTC")


def test_nested_binary_dictionary_and_large_values_reach_prompt_and_output(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    columns = {
        "text": pa.array(["a", "b"]).dictionary_encode(),
        "nested": pa.array([{"x": [1, 2]}, {"x": []}]),
        "blob": pa.array([b"bytes", b"more"]),
    }
    source = write_parquet(tmp_path / "in.parquet", columns)
    summary = run_fake_job(
        source,
        tmp_path / "out",
        tiny_checkpoint,
        input={"passthrough": "all"},
        prompt={"template": "{{ text }} {{ nested.x }} {{ nested }} {{ blob }}"},
    )
    assert (summary.exit_code, summary.num_results) == (0, 2)
    first = read_table(tmp_path / "out", "results")[0]
    assert (first["text"], first["nested"], first["blob"]) == ("a", {"x": [1, 2]}, b"bytes")


def test_a_null_in_the_template_is_a_reject_that_names_the_column(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["a", None, "c"]})
    summary = run_fake_job(source, tmp_path / "out", tiny_checkpoint)
    assert (summary.exit_code, summary.num_results, summary.num_rejects) == (3, 2, 1)
    error_type, message = rejected(tmp_path / "out")["in.parquet:1"]
    assert error_type == "null_value"
    assert "null on this row: text" in message


def test_text_that_is_not_utf8_is_a_reject_and_its_neighbours_are_answered(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    raw = pa.array([b"good", b"\xff\xfe bad", b"fine"], pa.binary())
    broken = pa.StringArray.from_buffers(3, *raw.buffers()[1:])
    source = write_parquet(tmp_path / "in.parquet", {"text": broken})
    summary = run_fake_job(source, tmp_path / "out", tiny_checkpoint, input={"passthrough": ["text"]})
    assert summary.num_results == 2
    error_type, message = rejected(tmp_path / "out")["in.parquet:1"]
    assert error_type == "invalid_value"
    assert "column 'text': expected valid UTF-8" in message


def test_duplicate_ids_keep_the_first_in_input_order(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = tmp_path / "in"
    write_parquet(source / "a.parquet", {"id": ["x", "y"], "text": ["zz first", "second"]})
    write_parquet(source / "b.parquet", {"id": ["y", "x", "z"], "text": ["aa third", "aa fourth", "fifth"]})
    run_fake_job(source, tmp_path / "out", tiny_checkpoint, input={"id_column": "id"})
    results = read_table(tmp_path / "out", "results")
    assert column(results, "custom_id") == ["x", "y", "z"]
    assert [Path(name).name for name in column(results, "source_file")] == ["a.parquet", "a.parquet", "b.parquet"]
    assert column(read_table(tmp_path / "out", "rejects"), "error_type") == ["duplicate_id"] * 2


def test_null_and_empty_ids_are_rejects_with_derived_ids(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"id": ["a", None, ""], "text": ["1", "2", "3"]})
    run_fake_job(source, tmp_path / "out", tiny_checkpoint, input={"id_column": "id"})
    assert {key: error for key, (error, _) in rejected(tmp_path / "out").items()} == {
        "in.parquet:1": "invalid_id",
        "in.parquet:2": "invalid_id",
    }


def test_a_template_that_raises_or_loops_ends_in_rejects(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"n": [1, 0, 10**12]})
    template = (
        "{% for a in range(n if n < 100000 else 99999) %}{% for b in range(50) %}x{% endfor %}{% endfor %}{{ 1 // n }}"
    )
    run_fake_job(source, tmp_path / "out", tiny_checkpoint, prompt={"template": template, "max_template_steps": 500})
    assert {key: error for key, (error, _) in rejected(tmp_path / "out").items()} == {
        "in.parquet:1": "template_failed",
        "in.parquet:2": "template_budget_exceeded",
    }


def test_a_prompt_over_the_context_is_a_reject_with_the_numbers(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["short", "long " * 2_000]})
    summary = run_fake_job(source, tmp_path / "out", tiny_checkpoint)
    assert summary.num_results == 1
    error_type, message = rejected(tmp_path / "out")["in.parquet:1"]
    assert error_type == "context_overflow"
    assert "context of 512 tokens" in message
    assert "prompt tokens + max_tokens 64" in message


def test_an_answer_cut_by_max_tokens_is_truncated_under_a_schema_and_visible_without(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["a"]})
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    script = write_script(tmp_path / "script.json", {"default": {"text": json.dumps({"key": "v" * 100})}})
    model = {"script": str(script)}
    sampling = {"max_tokens": 20}
    plain = run_fake_job(source, tmp_path / "plain", tiny_checkpoint, model=model, sampling=sampling)
    assert plain.num_results == 1
    assert column(read_table(tmp_path / "plain", "results"), "finish_reason") == ["length"]
    output = {"schema": str(tmp_path / "schema.json")}
    once = {"max_attempts": 1}
    checked = run_fake_job(
        source, tmp_path / "out", tiny_checkpoint, model=model, sampling=sampling, output=output, repair=once
    )
    assert checked.exit_code == 3
    (reject,) = read_table(tmp_path / "out", "rejects")
    assert (reject["error_type"], reject["completion_tokens"]) == ("truncated", 20)
    assert reject["output_text"].startswith('{"key"')


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ('{"type": "objec"}', r"schema\.json.*objec"),
        ('{"$ref": "#/$defs/missing"}', r"schema\.json.*missing"),
        ('{"$ref": "https://example.com/other.json"}', r"schema\.json.*example\.com"),
        ("{not json", r"schema\.json"),
    ],
)
def test_a_schema_that_is_invalid_is_refused_before_the_run(
    tmp_path: Path, tiny_checkpoint: Path, schema: str, expected: str
) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["a"]})
    (tmp_path / "schema.json").write_text(schema)
    with pytest.raises(JobFileError, match=expected):
        run_fake_job(source, tmp_path / "out", tiny_checkpoint, output={"schema": str(tmp_path / "schema.json")})


def test_a_recursive_schema_validates_recursive_answers(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["deep", "wrong"]})
    schema = {"type": "object", "properties": {"child": {"$ref": "#"}, "n": {"type": "integer"}}}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    rules = [{"contains": "wrong", "text": '{"child": {"child": {"n": "x"}}}'}]
    script = write_script(
        tmp_path / "script.json", {"default": {"text": '{"child": {"child": {"n": 1}}}'}, "rules": rules}
    )
    output = {"schema": str(tmp_path / "schema.json")}
    summary = run_fake_job(
        source,
        tmp_path / "out",
        tiny_checkpoint,
        model={"script": str(script)},
        output=output,
        repair={"max_attempts": 1},
    )
    assert (summary.num_results, summary.rejects_by_type) == (1, {"schema_violation": 1})
    assert "/child/child/n" in rejected(tmp_path / "out")["in.parquet:1"][1]


def test_columns_that_are_not_there_are_refused_with_the_nearest_name(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["a"], "Cost": [1]})
    with pytest.raises(JobFileError) as found:
        run_fake_job(
            source,
            tmp_path / "out",
            tiny_checkpoint,
            prompt={"template": "{{ texxt }}"},
            input={"id_column": "ident", "passthrough": ["Cost"]},
        )
    message = str(found.value)
    assert "has no column 'texxt'; did you mean 'text'?" in message
    assert "[input] id_column" in message
    assert "column 'Cost' would have the name of an output column (case ignored)" in message
    assert 'passthrough = { columns = ["Cost"], prefix = "in_" }' in message


def test_compatible_schemas_are_unified_and_contradicting_ones_refused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = tmp_path / "in"
    write_parquet(source / "a.parquet", {"text": pa.array(["a"], pa.string()), "n": pa.array([1], pa.int32())})
    write_parquet(
        source / "b.parquet", {"n": pa.array([2**40], pa.int64()), "text": pa.array(["b"], pa.large_string())}
    )
    write_parquet(source / "c.parquet", {"text": pa.array(["c"], pa.string())})
    run_fake_job(source, tmp_path / "out", tiny_checkpoint, input={"passthrough": ["n"]})
    assert column(read_table(tmp_path / "out", "results"), "n") == [1, 2**40, None]
    write_parquet(source / "d.parquet", {"text": pa.array([[1, 2]])})
    with pytest.raises(InputPatternError, match=r"d\.parquet: its columns contradict"):
        run_fake_job(source, tmp_path / "out2", tiny_checkpoint)


def jsonl(path: Path, lines: list[Any]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def batch_line(custom_id: Any, content: Any, **body: Any) -> dict[str, Any]:
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "tiny", "messages": [{"role": "user", "content": content}], **body},
    }


def test_jsonl_in_the_openai_batch_shape_is_answered_line_by_line(tmp_path: Path, tiny_checkpoint: Path) -> None:
    image = [{"type": "image_url", "image_url": {"url": "data:"}}]
    source = jsonl(
        tmp_path / "in.jsonl",
        [
            batch_line("ok", "hello"),
            "{broken",
            "",
            batch_line("short", "hello", max_tokens=3),
            batch_line("two", "hello", n=2),
            batch_line("many", "hello", n=129),
            batch_line("stream", "hello", stream=True),
            {**batch_line("embed", "hello"), "url": "/v1/embeddings"},
            batch_line("ok", "again"),
            batch_line(None, "hello"),
            batch_line("image", image),
            batch_line("hot", "hello", temperature=9),
            json.dumps(batch_line("surrogate", "\ud800")),
        ],
    )
    summary = run_fake_job(source, tmp_path / "out", tiny_checkpoint, prompt={"template": None})
    assert (summary.rows_in, summary.num_results, summary.exit_code) == (12, 4, 3)
    answers = read_table(tmp_path / "out", "results")
    found = [(row["custom_id"], row["sample"]) for row in answers]
    assert sorted(found) == [("ok", 0), ("short", 0), ("two", 0), ("two", 1)]
    results = {row["custom_id"]: row for row in answers}
    assert (results["ok"]["finish_reason"], results["short"]["finish_reason"]) == ("stop", "length")
    assert results["short"]["completion_tokens"] == 3
    found = [(row["custom_id"], row["error_type"]) for row in read_table(tmp_path / "out", "rejects")]
    assert found == [
        ("in.jsonl:1", "invalid_id"),
        ("many", "invalid_sampling"),
        ("stream", "unsupported_request"),
        ("embed", "unsupported_request"),
        ("ok", "duplicate_id"),
        ("in.jsonl:8", "invalid_id"),
        ("image", "unsupported_request"),
        ("hot", "invalid_sampling"),
        ("surrogate", "invalid_line"),
    ]


def test_messages_column_takes_structs_and_json_text(tmp_path: Path, tiny_checkpoint: Path) -> None:
    structs = pa.array([[{"role": "system", "content": "be terse"}, {"role": "user", "content": "hi"}], [], None])
    source = write_parquet(tmp_path / "in.parquet", {"chat": structs})
    texts = write_parquet(
        tmp_path / "text.parquet", {"chat": ['[{"role": "user", "content": "hi"}]', '[{"role": "robot"}]', "{"]}
    )
    prompt = {"template": None, "messages_column": "chat"}
    assert run_fake_job(source, tmp_path / "out", tiny_checkpoint, prompt=prompt).num_results == 1
    assert run_fake_job(texts, tmp_path / "out2", tiny_checkpoint, prompt=prompt).num_results == 1
    messages = dict(rejected(tmp_path / "out2").values())
    assert set(messages) == {"invalid_messages"}


def test_limit_answers_the_first_rows_only(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": TEXTS}, row_group_size=10)
    summary = launch(fake_job(source, tmp_path / "out", tiny_checkpoint), limit=13)
    assert summary.rows_in == 13
    assert column(read_table(tmp_path / "out", "results"), "source_row") == list(range(13))


def test_values_that_python_cannot_hold_reject_their_rows_alone(tmp_path: Path, tiny_checkpoint: Path) -> None:
    days = pa.array([0, 2**30, 1], pa.int32()).cast(pa.date32())
    source = write_parquet(tmp_path / "in.parquet", {"day": days})
    run_fake_job(source, tmp_path / "out", tiny_checkpoint, prompt={"template": "{{ day }}"})
    assert {key: error for key, (error, _) in rejected(tmp_path / "out").items()} == {"in.parquet:1": "invalid_value"}


def test_views_extensions_and_nested_dictionaries_pass_through(tmp_path: Path, tiny_checkpoint: Path) -> None:
    nested = pa.StructArray.from_arrays([pa.array(["x", "y"]).dictionary_encode()], ["kind"])
    for name in ("a", "b"):
        columns = {"text": [None, "ok"], "nested": nested, "view": pa.array(["v", "w"], pa.string_view())}
        write_parquet(tmp_path / "in" / f"{name}.parquet", columns)
    sections = {"input": {"passthrough": ["nested", "view"]}}
    summary = run_fake_job(tmp_path / "in", tmp_path / "out", tiny_checkpoint, **sections)
    assert (summary.num_results, summary.num_rejects) == (2, 2)
    assert column(read_table(tmp_path / "out", "rejects"), "nested") == [{"kind": "x"}] * 2
    assert column(read_table(tmp_path / "out", "results"), "view") == ["w", "w"]


def test_messages_that_json_cannot_hold_reject_their_rows_alone(tmp_path: Path, tiny_checkpoint: Path) -> None:
    good = '[{"role": "user", "content": "hi"}]'
    chats = [
        good,
        '[{"role": "user", "content": "hi", "w": NaN}]',
        '[{"role": "user", "content": "x", "n": "\\ud800"}]',
    ]
    source = write_parquet(tmp_path / "in.parquet", {"chat": chats})
    prompt = {"template": None, "messages_column": "chat"}
    summary = run_fake_job(source, tmp_path / "out", tiny_checkpoint, prompt=prompt)
    assert (summary.num_results, summary.rejects_by_type) == (1, {"invalid_messages": 2})


def test_one_wrong_jsonl_line_does_not_take_its_neighbours(tmp_path: Path, tiny_checkpoint: Path) -> None:
    long_number = '{"custom_id": "b", "url": "/v1/chat/completions", "body": {"messages": [{"n": ' + "9" * 5000 + "}]}}"
    nan = '{"custom_id": "c", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "n": NaN}]}}'
    source = jsonl(tmp_path / "in.jsonl", [batch_line("a", "hi"), long_number, nan, batch_line("d", "hi")])
    summary = run_fake_job(source, tmp_path / "out", tiny_checkpoint, prompt={"template": None})
    assert (summary.num_results, summary.num_rejects, summary.num_unreadable) == (2, 2, 0)


def test_a_derived_id_does_not_make_a_given_one_a_duplicate(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"id": [None, "in.parquet:0"], "text": ["a", "b"]})
    summary = run_fake_job(source, tmp_path / "out", tiny_checkpoint, input={"id_column": "id"})
    assert (summary.num_results, summary.rejects_by_type) == (1, {"invalid_id": 1})
