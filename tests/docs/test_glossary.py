"""The glossary stays small enough to read, and says each word once."""

import re

from tests.support.paths import ROOT

MAX_TERMS = 40


def test_the_glossary_has_few_words_each_once() -> None:
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", (ROOT / "docs" / "glossary.md").read_text("utf-8"), re.MULTILINE)
    words = [word.strip() for row in rows[1:] for word in row.split(",")]
    assert 0 < len(rows) - 1 <= MAX_TERMS
    assert len(words) == len(set(words))
