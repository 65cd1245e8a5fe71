"""Chat templates of checkpoints that go on for ever or swell: told at the load, or an error of the row they stop at."""

from pathlib import Path
from typing import Any

import pytest

from moebeam.model_runner.encoding import chat_template
from moebeam.model_runner.encoding.chat_encoding import load_encoding
from moebeam.model_runner.encoding.chat_template import ChatTemplate
from moebeam.model_runner.fence.fence import Program
from moebeam.schemas.chat_options import DEFAULT_OPTIONS
from moebeam.schemas.errors import EngineLoadError, InvalidMessages, RowError, TemplateBudgetExceeded
from moebeam.schemas.records import Message


@pytest.fixture(autouse=True)
def short_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes 2 s outside of tests takes 0.3 s here."""

    def hurried(*args: Any) -> Program:
        return Program(*args, max_cpu_s=0.3)

    monkeypatch.setattr(chat_template, "Program", hurried)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "0.3 s of processor time"),
        ("{{ 1|round(400000000, 'floor') }}", "0.3 s of processor time"),
        ("{{ (((9**9)**9)**9)**9999 }}", "0.3 s of processor time"),
        ("{{ 'x' * 10**12 }}", "768 MiB of memory"),
        ("{{ 'x' * (messages|length * 10**8) }}", "33554432 characters, found 100000000"),
        (
            "{% set n = namespace(v='x') %}{% for i in range(40) %}{% set n.v = n.v ~ n.v %}{% endfor %}",
            "expected at most",
        ),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself without end"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "recursion"),
        ("{% if 1 %}" * 300 + "{% endif %}" * 300, "recursion"),
        ("{% for %}", "expected a Jinja chat template"),
    ],
)
def test_a_template_that_no_chat_can_be_rendered_with_is_refused_naming_its_file(
    tmp_path: Path, source: str, found: str
) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(EngineLoadError, match=r"chat_template\.jinja: .*") as caught:
        load_encoding(str(tmp_path))
    assert found in str(caught.value)


def test_a_chat_that_takes_too_much_is_an_error_and_those_beside_it_are_rendered() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content }}"
        "{% if m.content == 'time' %}{{ m.content|length|round(400000000, 'floor') }}"
        "{% elif m.content == 'memory' %}{{ m.content * 10**9 }}{% elif m.content == 'no' %}{{ raise_exception('no') }}"
        "{% endif %}{% endfor %}"
    )
    texts = ["a", "time", "b", "memory", "c", "no", "d"]
    prompts = template.render_batch([([Message("user", text)], DEFAULT_OPTIONS) for text in texts])
    assert [type(prompt).__name__ if isinstance(prompt, RowError) else prompt for prompt in prompts] == [
        "a",
        "TemplateBudgetExceeded",
        "b",
        "TemplateBudgetExceeded",
        "c",
        "InvalidMessages",
        "d",
    ]


def test_a_template_that_hangs_over_past_calls_is_not_probed_for_each_form_of_them() -> None:
    template = ChatTemplate(
        "{% for m in messages if m.tool_calls %}{{ m.role|length|round(400000000, 'floor') }}{% endfor %}x"
    )
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    with pytest.raises(TemplateBudgetExceeded, match="processor time"):
        template.render([Message("user", "q"), Message("assistant", "", {"tool_calls": [call]})])
    assert template.render([Message("user", "q")]) == "x"


def test_what_a_template_says_is_cut() -> None:
    template = ChatTemplate("{% if messages[0].content == 'no' %}{{ raise_exception('x' * 1000000) }}{% endif %}")
    with pytest.raises(InvalidMessages) as caught:
        template.render([Message("user", "no")])
    assert len(str(caught.value)) == 2000
