"""The columns that templates read, by their own names and through `row`."""

import pytest

from moebeam.schemas.job.sections import PromptSection
from moebeam.transforms.render.prompt_template import PromptTemplate

NAMES = ("text", "review id", "review.text", "in", "extra")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ text }}", ["text"]),
        ('{{ row["review id"] }}{{ text }}', ["review id", "text"]),
        ("{{ row['review.text'] }}{{ row.text }}{{ row['in'] }}", ["in", "review.text", "text"]),
        ('{% if row["review id"] is defined %}{{ text }}{% endif %}', ["review id", "text"]),
        ("{% for row in text %}{{ row.item }}{% endfor %}", ["text"]),
        ("{{ row | tojson }}", sorted(NAMES)),
        ("{% for name in ['review id'] %}{{ row[name] }}{% endfor %}", sorted(NAMES)),
        ("{% if text %}{% set found = 1 %}{{ found }}{% endif %}", ["text"]),
        ("{% if text %}{% macro show(x) %}{{ x }}{% endmacro %}{{ show(text) }}{% endif %}", ["text"]),
        ("{% if text %}{% set extra = 1 %}{% endif %}{{ extra }}", ["extra", "text"]),
        ("{{ row.text }}{% for row in text %}{{ row.item }}{% endfor %}", sorted(NAMES)),
    ],
)
def test_row_reaches_columns_of_any_name(template: str, expected: list[str]) -> None:
    columns = PromptTemplate(PromptSection(template=template)).columns
    assert columns.choose(NAMES) == expected
    assert columns.needed is None or columns.needed >= set(expected)


def test_a_column_named_row_is_itself() -> None:
    template = PromptTemplate(PromptSection(template="{{ row.name }}{{ text }}"))
    assert template.columns.choose(("row", "text")) == ["row", "text"]
    (message,) = template.render({"row": {"name": "n"}, "text": "t"})
    assert message.content == "nt"


def test_columns_of_both_templates_are_read() -> None:
    section = PromptSection(system='{{ row["review id"] }}', template="{{ text }}")
    assert PromptTemplate(section).columns.choose(NAMES) == ["review id", "text"]


def test_row_holds_the_rows_values_and_its_nulls_are_named() -> None:
    template = PromptTemplate(PromptSection(template='{{ row["review id"] }}: {{ row["a.b"] | default("-", true) }}'))
    (message,) = template.render({"review id": 7, "a.b": None})
    assert message.content == "7: -"
    with pytest.raises(Exception, match="null on this row: review id"):
        template.render({"review id": None, "a.b": "x"})
