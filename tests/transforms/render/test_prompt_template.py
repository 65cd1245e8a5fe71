"""Prompt templates: what they print, and what stops them."""

import pickle
from datetime import date
from decimal import Decimal
from typing import Any

import pytest

from moebeam.schemas.errors import InvalidValue, JobFileError, NullValue, TemplateBudgetExceeded, TemplateFailed
from moebeam.schemas.job.sections import PromptSection
from moebeam.schemas.records import Message
from moebeam.transforms.render.prompt_template import PromptTemplate


def render(template: str, max_template_steps: int = 1000, **row: Any) -> str:
    section = PromptSection(template=template, max_template_steps=max_template_steps)
    (message,) = PromptTemplate(section).render(row)
    return message.content


def test_system_and_user_templates_become_messages_in_order() -> None:
    template = PromptTemplate(PromptSection(system="You serve {{ who }}.", template="{{ text }}\n"))
    assert template.columns.variables == {"who", "text"}
    assert template.render({"who": "ACME", "text": "hi"}) == (
        Message("system", "You serve ACME."),
        Message("user", "hi\n"),
    )


def test_templates_survive_pickling() -> None:
    template = pickle.loads(pickle.dumps(PromptTemplate(PromptSection(template="{{ a }}"))))
    assert template.render({"a": 1}) == (Message("user", "1"),)


def test_nested_values_print_as_json_and_bytes_as_utf8() -> None:
    assert render("{{ a }}", a={"x": [1, "é"], "day": date(2026, 1, 2)}) == '{"x": [1, "é"], "day": "2026-01-02"}'
    assert render("{{ a }}", a="né".encode()) == "né"
    assert render("{{ a }}", a=date(2026, 1, 2)) == "2026-01-02"
    with pytest.raises(InvalidValue, match="byte 0xff at position 1"):
        render("{{ a }}", a=b"a\xff")


def test_a_null_is_refused_unless_the_template_allows_it() -> None:
    with pytest.raises(NullValue, match="null on this row: a;"):
        render("{{ a }}{{ b }}", a=None, b=1)
    assert render("{{ a | default('none', true) }}", a=None) == "none"
    assert render("{% if a %}{{ a }}{% else %}-{% endif %}", a=None) == "-"


@pytest.mark.parametrize(
    "template",
    [
        "{{ a | trim }}",
        "{{ a | upper }}",
        "{{ a | string }}",
        "{{ 'x' ~ a }}",
        "{{ '%s' % a }}",
        "{{ '{}'.format(a) }}",
        "{{ a | replace('N', 'M') }}",
    ],
)
def test_no_filter_or_operator_turns_a_null_into_text(template: str) -> None:
    with pytest.raises(NullValue, match="null on this row: a;"):
        render(template, a=None)


def test_columns_may_have_the_names_of_jinja_globals_and_of_methods() -> None:
    assert render("{{ dict }} {{ cycler }} {{ order.items }}", dict="d", cycler="c", order={"items": "i"}) == "d c i"
    assert PromptTemplate(PromptSection(template="{{ joiner }}{{ lipsum }}")).columns.variables == {"joiner", "lipsum"}


@pytest.mark.parametrize("template", ["{{ a.upper }}", "{{ b | map('upper') }}", "{{ range }}"])
def test_what_has_no_text_of_its_own_is_not_printed(template: str) -> None:
    with pytest.raises(TemplateFailed, match="expected a value to print"):
        render(template, a="x", b=["x"])


def test_json_in_prompts_is_not_escaped_for_html_or_ascii() -> None:
    row = {"a": {"t": "Tom & <Jerry> 中文", "cost": Decimal("1.50")}}
    assert render("{{ a | tojson }}", **row) == '{"t": "Tom & <Jerry> 中文", "cost": "1.50"}'
    assert render("{{ (a | tojson) + ' < x' }}", **row).endswith("} < x")
    assert render("{{ 5000000 | string }} {{ '{:,}'.format(5000000) }}") == "5000000 5,000,000"


def test_a_syntax_error_names_the_key_and_the_line() -> None:
    with pytest.raises(JobFileError, match=r"\[prompt\] template: line 2: "):
        PromptTemplate(PromptSection(template="one\n{% for %}"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ a.missing.field }}",
        "{{ 1 // 0 }}",
        "{{ a.__class__.__mro__ }}",
        "{{ raise_it() }}",
        "{% include 'other' %}",
        "{% for x in a.items() %}{{ a.update({1: 2}) }}{% endfor %}",
    ],
)
def test_whatever_a_template_raises_is_a_typed_failure(template: str) -> None:
    with pytest.raises(TemplateFailed):
        render(template, a={"k": 1}, raise_it="x")


@pytest.mark.parametrize(
    "template",
    [
        "{% for x in range(2000) %}{% endfor %}",
        "{% for x in range(40) %}{% for y in range(40) %}{% endfor %}{% endfor %}",
        "{% for x in range(40) %}{{ [x] | map('string') | join }}{% for y in range(40) %}.{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'x' * 1000000000 }}",
        "{{ 9 ** 999999999 }}",
        "{% set ns = namespace(t='xxxxxxxx') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
        "{% set ns = namespace(t='xxxxxxxx') %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
        "{% for i in range(999) %}{{ 'x' * 100000 }}{% endfor %}",
        "{% for x in [0] recursive %}{% if loop.depth < 3 %}{{ loop(range(9999)) }}{% endif %}{% endfor %}",
        "{{ [1] | slice(3000000) | list }}",
        "{{ 'a'.ljust(300000000) }}",
        "{{ 'a' | center(300000000) }}",
        "{{ '%300000000d' % 1 }}",
        "{{ '{:300000000}'.format(1) }}",
        "{{ ('x' * 9999 | int) | replace('x', 'y' * 9999) }}",
    ],
)
def test_templates_that_loop_or_grow_are_stopped(template: str) -> None:
    with pytest.raises(TemplateBudgetExceeded):
        render(template)


def test_one_row_does_not_use_up_the_budget_of_the_next() -> None:
    template = PromptTemplate(PromptSection(template="{% for x in a %}.{% endfor %}", max_template_steps=5))
    for _ in range(3):
        assert template.render({"a": [1, 2, 3, 4, 5]}) == (Message("user", "....."),)


def test_a_row_too_large_for_any_prompt_is_an_error_before_it_is_sent_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moebeam.transforms.render.prompt_template.MAX_PROMPT_CHARACTERS", 10)
    first, second = PromptTemplate(PromptSection(template="{{ text[:3] }}")).render_batch(
        [{"text": "x" * 11}, {"text": "fine"}]
    )
    assert isinstance(first, TemplateBudgetExceeded)
    assert str(first) == "column 'text': expected at most 10 characters, found 11"
    assert second == (Message("user", "fin"),)
