"""The benchmark of constrained answers: its report, that it would see a wrong answer, its synthetic tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import constrained
from benchmarks.synthetic_tokenizer import END_TOKEN_ID, SPECIAL_TOKENS, synthetic_tokenizer
from moebeam.model_runner.grammar.json_grammar import EnforceableSchema
from moebeam.schemas.canonical import Json


def run(folder: Path, schemas: dict[str, Any], *arguments: str) -> tuple[int, dict[str, Any]]:
    source = folder / "schemas"
    source.mkdir()
    for name, content in schemas.items():
        (source / name).write_text(content if isinstance(content, str) else json.dumps({"schema": content, "id": 7}))
    out = folder / "out" / "found.json"
    options = ["--tokenizer", "demo", "--attempts", "3", *arguments]
    code = constrained.main(["--schemas", str(source), "--json", str(out), *options])
    return code, json.loads(out.read_text()) if out.exists() else {}


def test_each_schema_has_its_status_and_its_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schemas: dict[str, Any] = {
        "a.json": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
        "b.json": {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True},
        "c.json": False,
        "d.json": {"type": "nonsense"},
        "e.json": "not json",
        "f.json": '{"no": 1}',
        "ignored.txt": "x",
    }
    code, found = run(tmp_path, schemas)
    assert code == 0
    by_file = {one["file"]: one for one in found["schemas"]}
    assert {name: one["status"] for name, one in by_file.items()} == {
        "a.json": "compiled",
        "b.json": "relaxed",
        "c.json": "unsupported",
        "d.json": "unsupported",
    }
    assert [by_file["a.json"][name] for name in ("attempts", "completed", "valid", "keyword")] == [3, 3, 3, None]
    assert by_file["b.json"]["keyword"] == "uniqueItems"
    assert by_file["b.json"]["keywords"] == [
        {"pointer": "", "keyword": "uniqueItems", "reason": "a grammar does not compare items"}
    ]
    assert "refuses every value" in by_file["c.json"]["reason"]
    assert [one["file"] for one in found["unreadable"]] == ["e.json", "f.json"]
    totals = found["totals"]
    assert [totals[name] for name in ("num_schemas", "compiled", "relaxed", "unsupported")] == [4, 1, 1, 2]
    assert totals["compiled_valid_share"] == 1.0
    assert totals["mask_ms"]["p50"] > 0
    assert totals["compile_ms"]["p99"] > 0
    assert "e.json" in capsys.readouterr().err


def test_the_same_seed_draws_the_same_answers(tmp_path: Path) -> None:
    model = constrained.RandomModel("demo", 0)
    schema: Json = {"type": "array", "items": {"type": ["string", "number"]}}
    drawn = []
    for seed in (1, 1, 2):
        grammar = constrained.json_schema_grammar(constrained.enforceable_schema(schema).document)
        texts = [
            model.draw(model.compile(grammar), constrained.np.random.default_rng([seed, i]), 500)[0] for i in range(5)
        ]
        drawn.append(texts)
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_answer_that_does_not_come_to_its_end_is_not_complete(tmp_path: Path) -> None:
    schema = {"type": "string", "minLength": 500}
    _, found = run(tmp_path, {"a.json": schema}, "--max-tokens", "20")
    (one,) = found["schemas"]
    assert [one[name] for name in ("attempts", "completed", "valid")] == [3, 0, 0]
    assert one["failures"] == []


def test_a_grammar_that_is_too_wide_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constrained, "enforceable_schema", lambda schema: EnforceableSchema({"type": "integer"}, ()))
    _, found = run(tmp_path, {"a.json": {"type": "boolean"}})
    (one,) = found["schemas"]
    assert (one["status"], one["completed"], one["valid"]) == ("compiled", 3, 0)
    assert "type" in one["failures"][0]["reason"]
    assert found["totals"]["compiled_valid_share"] == 0.0


@pytest.mark.parametrize("schemas", [{}, {"a.json": "[]"}])
def test_nothing_that_can_be_read_is_exit_code_2(tmp_path: Path, schemas: dict[str, Any]) -> None:
    assert run(tmp_path, schemas) == (2, {})


@pytest.mark.parametrize("arguments", [["--attempts", "-1"], ["--max-tokens", "0"], ["--seed", "-1"]])
def test_wrong_arguments_are_refused(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, {"a.json": True}, *arguments)


def test_the_synthetic_tokenizer_has_its_size_and_spells_every_text() -> None:
    tokenizer = synthetic_tokenizer(3_000)
    assert tokenizer.get_vocab_size() == 3_000
    assert tokenizer.token_to_id(SPECIAL_TOKENS[1]) == END_TOKEN_ID
    for text in ('{"name": "é€😀",\n  "b": [1, 2]}', "\x00\x7f", "Bobobo babe"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert len(tokenizer.encode('{"a":"b"}').ids) < len('{"a":"b"}')
    with pytest.raises(ValueError, match="at least"):
        synthetic_tokenizer(100)
