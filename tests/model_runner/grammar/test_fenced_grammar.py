"""Grammars of schemas that are not plain are made behind the fence, and are the same there."""

from typing import Any

import pytest

from moebeam.model_runner.grammar import fenced_grammar
from moebeam.model_runner.grammar.answer_grammar import build_answer_grammar
from moebeam.model_runner.grammar.fenced_grammar import make_answer_grammar
from moebeam.schemas.chat_options import ChatOptions, ResponseFormat, Tool
from moebeam.schemas.errors import InvalidGrammar

NOT_PLAIN = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^x+$"}}, "not": {"required": ["b"]}}


def make(build: Any, options: ChatOptions, schema: Any = None, call_format: str | None = None) -> Any:
    tokens = {"</think>": 7}
    return build(
        options, schema=schema, call_format=call_format, starts_in_reasoning=True, token_id=tokens.get, formats="assert"
    )


@pytest.mark.parametrize("call_format", [None, "deepseek_v4", "hermes"])
def test_a_grammar_is_the_same_on_both_sides_of_the_fence(call_format: str | None) -> None:
    tool = Tool("f", {"name": "f", "parameters": NOT_PLAIN, "strict": True})
    options = ChatOptions(tools=(tool,), response_format=ResponseFormat("json_schema", NOT_PLAIN))
    fenced = make(make_answer_grammar, options, NOT_PLAIN, call_format)
    assert fenced == make(build_answer_grammar, options, NOT_PLAIN, call_format)
    assert fenced is not None


@pytest.mark.parametrize("is_given", [True, False])
def test_a_schema_that_takes_too_much_has_no_grammar(monkeypatch: pytest.MonkeyPatch, *, is_given: bool) -> None:
    monkeypatch.setattr(fenced_grammar, "MAX_GRAMMAR_CPU_S", 0.2)
    many: dict[str, Any] = {"properties": {f"p{index}": {"pattern": f"^{index}"} for index in range(20_000)}}
    with pytest.raises(InvalidGrammar, match=r"expected at most 0\.2 s of processor time"):
        make(
            make_answer_grammar,
            ChatOptions(response_format=ResponseFormat("json_schema", many)),
            many if is_given else None,
        )


def test_a_schema_that_refuses_every_value_has_none_either() -> None:
    with pytest.raises(InvalidGrammar, match="refuses every value"):
        make(make_answer_grammar, ChatOptions(), {"not": {}})
