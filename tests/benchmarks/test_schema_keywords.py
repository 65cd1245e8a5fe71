"""The table of keywords: what counts as a keyword, what as a schema, and when a group is refused, wrong or relaxed."""

import json
from pathlib import Path

from benchmarks.schema_keywords import keywords_in, main, read_sample, suite_row
from moebeam.schemas.canonical import Json


def group(schema: Json, *tests: tuple[Json, bool]) -> dict[str, Json]:
    return {"schema": schema, "tests": [{"data": data, "valid": valid} for data, valid in tests]}


def test_names_of_properties_and_plain_data_are_no_keywords() -> None:
    schema: Json = {"properties": {"not": {"enum": [{"if": 1}]}}, "items": [{"minimum": 1}]}
    assert sorted(keywords_in(schema)) == ["enum", "items", "minimum", "properties"]


def test_a_sample_holds_each_schema_once(tmp_path: Path) -> None:
    tool = {"function": [{"name": "f", "parameters": {"type": "dict", "properties": {"a": {"type": "float"}}}}]}
    (tmp_path / "lines.json").write_text(f"{json.dumps(tool)}\n{json.dumps(tool)}\n")
    (tmp_path / "held.json").write_text(json.dumps({"schema": {"type": "null"}}))
    (tmp_path / "broken.json").write_text("{")
    assert read_sample(tmp_path) == [
        {"type": "null"},
        {"type": "object", "properties": {"a": {"type": "number"}}},
    ]


def test_a_group_is_refused_natively_and_relaxed_or_exact_when_rewritten() -> None:
    row = suite_row(
        [
            group({"type": "integer", "not": {"const": 3}}, (3, False), (4, True)),
            group({"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True}, ([1, 1], False), ([1], True)),
            group({"type": "string", "format": "date"}, ("2021-02-29", False), ("2020-02-29", True)),
        ],
        num_draws=2,
    )
    assert [row["native"][name] for name in ("groups", "refused", "wrong")] == [3, 2, 1]
    assert [row["rewritten"][name] for name in ("refused", "relaxed", "wrong")] == [0, 1, 0]


def test_the_program_writes_what_it_counted(tmp_path: Path) -> None:
    (tmp_path / "not.json").write_text(json.dumps([group({"type": "integer", "not": {"const": 3}}, (4, True))]))
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "a.json").write_text(json.dumps({"schema": {"type": "boolean"}}))
    out = tmp_path / "out.json"
    arguments = ["--suite", tmp_path, "--sample", f"mine={tmp_path / 'sample'}", "--draws", 4, "--json", out]
    assert main([str(argument) for argument in arguments]) == 0
    found = json.loads(out.read_text())
    assert found["suite"]["not"]["native"]["refused"] == 1
    assert found["uses"]["mine"]["type"] == 1
    assert found["real"]["mine/rewritten"]["refused"] == 0
