"""What llguidance enforces of JSON Schema by itself and what our rewriting adds, keyword by keyword.

`python -m benchmarks.schema_keywords --suite DIR --sample NAME=DIR ... --json OUT.json`

DIR of `--suite` is the official test suite's `draft2020-12`. Each of its groups becomes a grammar twice: as it stands
(native) and after `enforceable_schema` (rewritten). A group is refused where no grammar can be made of it, wrong where
the grammar admits an instance that the suite calls invalid or where a random answer under it breaks the schema for
jsonschema-rs, and relaxed where the rewriting says that it leaves something to validation. Answers with numbers beyond
a double (1e999) count apart: natively, they are possible wherever a number is unbounded.

DIR of `--sample` holds `*.json` and JSON Lines: schemas, `{"schema": ...}` (MaskBench) or tools with `parameters`
(BFCL). Equal schemas count once. Printed are how many schemas of each sample use a keyword, and what becomes of
`--limit` of them, drawn at random, under either way.
"""

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebeam.model_runner.grammar.constraint import Constraint
from moebeam.model_runner.grammar.json_grammar import enforceable_schema, json_schema_grammar
from moebeam.schemas.canonical import Json, canonical_json
from moebeam.schemas.contract.answer_schema import AnswerSchema
from moebeam.schemas.errors import EngineFailed, InvalidGrammar, JobFileError, NotJson, RowError
from tests.support.models.grammar_sampling import byte_tokenizer, compiler, draw_answers

_FILES = {"if": ["if-then-else"], "$ref": ["ref", "anchor", "defs"], "$dynamicRef": ["dynamicRef"]}
_FORMATS = "optional/format/*"
_SIDE = {"type": "number", "minimum": 0}
_OWN: dict[str, list[dict[str, Any]]] = {
    "oneOf (disjoint)": [
        {
            "schema": {
                "oneOf": [
                    {"type": "object", "properties": {"kind": {"const": kind}, side: _SIDE}, "required": ["kind", side]}
                    for kind, side in (("circle", "radius"), ("square", "side"))
                ]
            },
            "tests": [
                {"data": {"kind": "circle", "radius": 1}, "valid": True},
                {"data": {"kind": "circle", "side": 1}, "valid": False},
            ],
        },
        {
            "schema": {"oneOf": [{"type": "integer"}, {"type": "string"}]},
            "tests": [{"data": 1, "valid": True}, {"data": None, "valid": False}],
        },
    ],
    "oneOf (overlapping)": [
        {
            "schema": {"type": "object", "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
            "tests": [{"data": {"a": 1, "b": 1}, "valid": False}, {"data": {"a": None}, "valid": True}],
        },
        {
            "schema": {"oneOf": [{"type": "integer"}, {"minimum": 2}]},
            "tests": [{"data": 1, "valid": True}, {"data": 3, "valid": False}],
        },
    ],
}
"""Groups beside the suite's, which has hardly a `oneOf` whose schemas exclude one another."""

KEYWORDS = (
    *(
        "type",
        "enum",
        "const",
        "allOf",
        "anyOf",
        "oneOf",
        "oneOf (disjoint)",
        "oneOf (overlapping)",
        "not",
        "if",
        "$ref",
        "$dynamicRef",
    ),
    *("properties", "required", "additionalProperties", "patternProperties", "propertyNames"),
    *("minProperties", "maxProperties", "dependentRequired", "dependentSchemas"),
    *("unevaluatedProperties", "unevaluatedItems", "items", "prefixItems"),
    *("contains", "minContains", "maxContains", "uniqueItems", "minItems", "maxItems"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("minLength", "maxLength", "pattern", "format"),
)
_ONE = ("additionalProperties", "additionalItems", "propertyNames", "items", "contains", "not", "if", "then", "else")
_NAMED = ("properties", "patternProperties", "dependentSchemas", "dependencies", "$defs", "definitions")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_BFCL_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
MAX_SCHEMA_BYTES = 60_000


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a schema: `refused`, `exact` or `relaxed`, and what its grammar admitted wrongly."""

    status: str
    reason: str = ""
    num_admitted: int = 0
    num_valid_refused: int = 0
    num_drawn: int = 0
    num_drawn_invalid: int = 0
    num_beyond_double: int = 0

    @property
    def is_wrong(self) -> bool:
        return self.num_admitted + self.num_drawn_invalid > 0


def compile_schema(schema: Json, is_rewritten: bool) -> tuple[Constraint, str]:
    """The constraint of a schema, and `exact` or `relaxed`.

    Raises:
        InvalidGrammar: there is none.
    """
    relaxed: tuple[Any, ...] = ()
    if is_rewritten:
        enforceable = enforceable_schema(schema)
        schema, relaxed = enforceable.document, enforceable.relaxed
    constraint = compiler().compile(json_schema_grammar(schema, max_whitespace=2))
    return constraint, "relaxed" if relaxed else "exact"


def admits(constraint: Constraint, value: Json) -> bool:
    """Whether a grammar admits a value as Python writes it."""
    copied = Constraint(constraint.matcher.deep_copy(), constraint.num_words)
    try:
        for token_id in byte_tokenizer().encode(json.dumps(value, ensure_ascii=False), add_special_tokens=False).ids:
            copied.accept(token_id)
    except EngineFailed:
        return False
    return copied.can_end


def try_schema(schema: Json, *, is_rewritten: bool, tests: Sequence[Mapping[str, Any]], num_draws: int) -> Outcome:
    """Compile, ask for each instance of the suite, draw random answers and validate them."""
    try:
        constraint, status = compile_schema(schema, is_rewritten)
        contract = AnswerSchema.from_json(schema, formats="assert", source="schema")
    except (InvalidGrammar, JobFileError, ArithmeticError) as error:
        return Outcome("refused", str(error))
    answers = {bool(test["valid"]): Counter[bool]() for test in tests} | {True: Counter(), False: Counter()}
    for test in tests:
        answers[test["valid"]][admits(constraint, test["data"])] += 1
    num_invalid, num_beyond_double = 0, 0
    try:
        drawn = draw_answers(constraint, 0, num_draws)
    except (AssertionError, EngineFailed):  # llguidance ran past one of its limits
        drawn = []
    for text in drawn:
        try:
            contract.check(text)
        except NotJson:
            num_beyond_double += 1
        except RowError:
            num_invalid += 1
    return Outcome(status, "", answers[False][True], answers[True][False], len(drawn), num_invalid, num_beyond_double)


def read_suite(suite: Path, keyword: str) -> Iterator[Mapping[str, Any]]:
    """The groups of the official suite that are about a keyword; those that need other documents are left out."""
    yield from _OWN.get(keyword, ())
    names = [_FORMATS] if keyword == "format" else _FILES.get(keyword, [keyword])
    for path in sorted(path for name in names for path in suite.glob(f"{name}.json")):
        yield from (group for group in json.loads(path.read_text()) if "localhost" not in json.dumps(group))


def read_sample(folder: Path) -> list[Json]:
    """The different schemas below a folder."""
    found: dict[str, Json] = {}
    for path in sorted(folder.rglob("*.json")):
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        for schema in (schema for document in _documents(text) for schema in _schemas_in(document)):
            found.setdefault(canonical_json(schema), schema)
    return list(found.values())


def _documents(text: str) -> list[Any]:
    for split in (lambda: [text], text.splitlines):
        try:
            return [json.loads(part) for part in split() if part.strip()]
        except (ValueError, RecursionError):
            continue
    return []


def _schemas_in(document: Any) -> Iterator[Json]:
    if not isinstance(document, dict):
        return
    if isinstance(document.get("schema"), dict):
        yield document["schema"]
    elif "function" in document or isinstance(document.get("parameters"), dict):
        tools = document.get("function", document)
        yield from (_as_json_schema(tool["parameters"]) for tool in (tools if isinstance(tools, list) else [tools]))
    elif "json-schema.org" in str(document.get("$schema")) or isinstance(document.get("properties"), dict):
        yield document


def _as_json_schema(parameters: Any) -> Any:
    """BFCL's parameters, whose types are Python's."""
    if isinstance(parameters, list):
        return [_as_json_schema(item) for item in parameters]
    if not isinstance(parameters, dict):
        return parameters
    found = {name: _as_json_schema(value) for name, value in parameters.items()}
    if isinstance(found.get("type"), str):
        found["type"] = _BFCL_TYPES.get(found["type"], found["type"])
    return found


def keywords_in(schema: Any) -> Iterator[str]:
    """The keywords of a schema and of those within it; names of properties and plain data are none."""
    waiting = [schema]
    while waiting:
        schema = waiting.pop()
        if not isinstance(schema, dict):
            continue
        yield from schema
        for keyword, value in schema.items():
            if isinstance(value, dict) and keyword in (*_ONE, "unevaluatedProperties", "unevaluatedItems"):
                waiting.append(value)
            elif isinstance(value, dict) and keyword in _NAMED:
                waiting += value.values()
            elif isinstance(value, list) and keyword in _LISTS:
                waiting += value


def suite_row(groups: Sequence[Mapping[str, Any]], num_draws: int) -> dict[str, dict[str, int]]:
    """For both ways: how many groups are refused, wrong and relaxed, and what was counted on the way."""
    row: dict[str, dict[str, int]] = {}
    for way in ("native", "rewritten"):
        outcomes = [
            try_schema(group["schema"], is_rewritten=way == "rewritten", tests=group["tests"], num_draws=num_draws)
            for group in groups
            if any(test["valid"] for test in group["tests"])
        ]
        row[way] = count_outcomes(outcomes)
    return row


def count_outcomes(outcomes: Sequence[Outcome]) -> dict[str, int]:
    exact = [outcome for outcome in outcomes if outcome.status == "exact"]
    return {
        "groups": len(outcomes),
        "refused": sum(outcome.status == "refused" for outcome in outcomes),
        "relaxed": sum(outcome.status == "relaxed" for outcome in outcomes),
        "wrong": sum(outcome.is_wrong for outcome in exact),
        "admitted": sum(outcome.num_admitted for outcome in exact),
        "drawn": sum(outcome.num_drawn for outcome in exact),
        "drawn_invalid": sum(outcome.num_drawn_invalid for outcome in exact),
        "beyond_double": sum(outcome.num_beyond_double for outcome in exact),
        "only_beyond_double": sum(outcome.num_beyond_double > 0 and not outcome.is_wrong for outcome in exact),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and write what was counted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schema_keywords")
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--sample", action="append", default=[], help="NAME=DIR, may be repeated")
    parser.add_argument("--limit", type=int, default=200, help="schemas of a sample that are compiled")
    parser.add_argument("--draws", type=int, default=20, help="answers for each group; a quarter for real schemas")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    samples = {name: read_sample(Path(folder)) for name, _, folder in (text.partition("=") for text in args.sample)}
    uses = {
        name: Counter(word for schema in found for word in set(keywords_in(schema))) for name, found in samples.items()
    }
    rows = {keyword: suite_row(list(read_suite(args.suite, keyword)), args.draws) for keyword in KEYWORDS}
    heads = " | ".join(f"{name} ({len(found)})" for name, found in samples.items())
    print(f"keyword | groups | native: refused, wrong, 1e999 | rewritten: refused, relaxed, wrong | {heads}")
    for keyword, row in rows.items():
        native = ", ".join(str(row["native"][name]) for name in ("refused", "wrong", "only_beyond_double"))
        rewritten = ", ".join(str(row["rewritten"][name]) for name in ("refused", "relaxed", "wrong"))
        counts = " | ".join(str(found[keyword]) for found in uses.values())
        print(f"{keyword} | {row['native']['groups']} | {native} | {rewritten} | {counts}")
    real: dict[str, Any] = {}
    for name, found in samples.items():
        small = [schema for schema in found if len(json.dumps(schema)) <= MAX_SCHEMA_BYTES]
        chosen = random.Random(0).sample(small, min(args.limit, len(small)))
        for way in ("native", "rewritten"):
            outcomes = [
                try_schema(schema, is_rewritten=way == "rewritten", tests=(), num_draws=args.draws // 4)
                for schema in chosen
            ]
            reasons = Counter(outcome.reason[:160] for outcome in outcomes if outcome.status == "refused")
            real[f"{name}/{way}"] = count_outcomes(outcomes) | {"reasons": reasons.most_common(20)}
            print(f"{name}, {way}: {count_outcomes(outcomes)}")
    args.json.write_text(json.dumps({"suite": rows, "uses": uses, "real": real}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
