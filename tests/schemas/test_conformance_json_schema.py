"""`AnswerSchema` agrees with the official JSON Schema test suite, draft 2020-12, read in place."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from moebeam.schemas.canonical import Json
from moebeam.schemas.contract.answer_schema import AnswerSchema, Formats
from moebeam.schemas.errors import SchemaViolation
from tests.support.paths import SHARED

SUITE = SHARED / "conformance" / "json_schema_test_suite"
REMOTE = "http://localhost:1234/"

pytestmark = [
    pytest.mark.conformance,
    pytest.mark.skipif(not SUITE.is_dir(), reason="../shared/conformance is not there"),
]


def retrieve(uri: str) -> Json:
    if not uri.startswith(REMOTE):
        raise LookupError(f"not one of the suite's remotes: {uri}")
    return json.loads((SUITE / "remotes" / uri.removeprefix(REMOTE)).read_text(encoding="utf-8"))


def verdicts(pattern: str, formats: Formats) -> Iterator[tuple[str, bool]]:
    """For each case its name, and whether the verdict was the suite's."""
    for path in sorted(SUITE.glob(pattern)):
        groups: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        for group in groups:
            name = f"{path.name}: {group['description']}"
            schema = AnswerSchema.from_json(group["schema"], formats=formats, source=name, retriever=retrieve)
            for case in group["tests"]:
                yield f"{name}: {case['description']}", accepts(schema, case["data"]) == case["valid"]


def accepts(schema: AnswerSchema, data: Json) -> bool:
    try:
        schema.check(json.dumps(data))
    except SchemaViolation:
        return False
    return True


@pytest.mark.parametrize(
    ("pattern", "formats", "num_cases"),
    [("draft2020-12/*.json", "annotate", 1299), ("draft2020-12/optional/format/*.json", "assert", 764)],
)
def test_every_case_of_the_suite_gets_its_verdict(pattern: str, formats: Formats, num_cases: int) -> None:
    found = dict(enumerate(verdicts(pattern, formats)))
    assert len(found) == num_cases
    assert [name for name, is_right in found.values() if not is_right] == []


def test_formats_are_not_asserted_when_they_annotate() -> None:
    """The counts above would also be reached by a switch that does nothing, if it did nothing in both positions."""
    wrong = [name for name, is_right in verdicts("draft2020-12/optional/format/*.json", "annotate") if not is_right]
    assert len(wrong) > 100
