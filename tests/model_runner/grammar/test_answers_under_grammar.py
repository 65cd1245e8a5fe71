"""Answers drawn at random under their grammars, from the mask of each token to the parser and the validator."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tokenizers

from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH
from moebeam.model_runner.encoding.chat.answers import END_OF_THINKING as THINK_END
from moebeam.model_runner.encoding.chat.call_formats import DEEPSEEK_V3, DEEPSEEK_V3_1, HERMES, CallFormat
from moebeam.model_runner.encoding.deepseek.dsml import V3_2_CALLS, V4_1_CALLS, V4_CALLS
from moebeam.model_runner.grammar.answer_grammar import BuiltGrammar, build_answer_grammar
from moebeam.model_runner.grammar.constraint import ConstraintCompiler, MaskFiller
from moebeam.schemas.chat_options import ChatOptions, ToolChoice, parse_tools
from moebeam.schemas.contract.answer_schema import AnswerSchema
from moebeam.schemas.errors import MalformedToolCall
from moebeam.schemas.records import ToolCall

FORMATS: list[CallFormat] = [V4_CALLS, V3_2_CALLS, V4_1_CALLS, DEEPSEEK_V3, DEEPSEEK_V3_1, HERMES]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}, "level": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "level"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "code": {"type": "string", "pattern": "^[A-Z]{2}$"},
        "near": {"$ref": "#/$defs/place"},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": "boolean"}}, "additionalProperties": False}},
}
TOOLS = parse_tools(
    [{"name": "weather", "parameters": WEATHER}, {"name": "now"}, {"name": "kind", "parameters": SCHEMA}]
)
EOS = 1


@pytest.fixture(scope="module", params=[True, False], ids=["tokens", "spelled"])
def tokenizer(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    """The demo's tokenizer, with and without tokens of its own for the markup of calls."""
    made = tokenizers.Tokenizer.from_file(str(CHECKPOINT_PATH / "tokenizer.json"))
    if request.param:
        markup = sorted({token for call_format in FORMATS for token in call_format.markup})
        made.add_special_tokens(markup)
    return made


class Sampler:
    """Draws random answers under a grammar; the longer an answer, the sooner it takes a token that comes to an end."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.tokenizer = tokenizer
        vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        self.compiler = ConstraintCompiler(tokenizer, vocab_size, [EOS])
        self.filler = MaskFiller(vocab_size)
        texts = [tokenizer.decode([token_id], skip_special_tokens=False) for token_id in range(vocab_size)]
        self.ends = {token_id for token_id, text in enumerate(texts) if text[:1] in ('"', "<", "\n", "}", "]")} | {EOS}

    def draw(self, grammar: BuiltGrammar, seed: int, max_tokens: int = 400) -> tuple[str, bool]:
        """The text of an answer, and whether it came to its end."""
        rng = np.random.default_rng(seed)
        constraint = self.compiler.compile(grammar.text)
        token_ids: list[int] = []
        while len(token_ids) < max_tokens and not constraint.is_over:
            forced = constraint.find_forced_token_ids()
            token_id = forced[0] if forced else self._pick(constraint, rng, len(token_ids))
            constraint.accept(token_id)
            if token_id == EOS:
                break
            token_ids.append(token_id)
        assert constraint.failure is None
        is_over = constraint.is_over or constraint.can_end
        return self.tokenizer.decode(token_ids, skip_special_tokens=False), is_over

    def _pick(self, constraint: Any, rng: np.random.Generator, num_tokens: int) -> int:
        masks = self.filler.start([constraint]).result()
        assert masks is not None
        allowed = np.flatnonzero(np.unpackbits(masks[0].numpy().view(np.uint8), bitorder="little"))
        assert len(allowed), "nothing is allowed"
        ending = [token_id for token_id in allowed.tolist() if token_id in self.ends]
        if ending and rng.random() < 0.1 + num_tokens / 80:
            return int(rng.choice(ending))
        return int(rng.choice(allowed))


@pytest.fixture(scope="module")
def sampler(tokenizer: tokenizers.Tokenizer) -> Sampler:
    return Sampler(tokenizer)


def built(sampler: Sampler, options: ChatOptions, call_format: CallFormat | None, **changes: Any) -> BuiltGrammar:
    arguments = {"schema": None, "starts_in_reasoning": False, **changes}
    found = build_answer_grammar(
        options, call_format=call_format and call_format.name, token_id=sampler.tokenizer.token_to_id, **arguments
    )
    assert found is not None
    return found


def calls_in(text: str, call_format: CallFormat) -> Sequence[ToolCall]:
    found = call_format.find(text, 0)
    assert found is not None, text
    return call_format.parse(text, found[1])


def check(calls: Sequence[ToolCall]) -> None:
    by_name = {tool.name: tool for tool in TOOLS}
    for call in calls:
        schema = AnswerSchema.from_json(by_name[call.name].parameters, formats="assert", source=call.name)
        schema.check(call.arguments)


@pytest.mark.parametrize("call_format", FORMATS, ids=lambda one: one.name)
def test_demanded_calls_are_read_back_and_keep_their_schemas(sampler: Sampler, call_format: CallFormat) -> None:
    options = ChatOptions(tools=TOOLS, tool_choice=ToolChoice("required"))
    grammar = built(sampler, options, call_format)
    drawn = [sampler.draw(grammar, seed) for seed in range(40)]
    complete = [text for text, is_over in drawn if is_over]
    assert len(complete) >= 15
    names: set[str] = set()
    for text in complete:
        calls = calls_in(text, call_format)
        assert calls
        check(calls)
        names |= {call.name for call in calls}
    assert names >= {"now", "kind"}


WEATHER_CALLS = [
    {"city": "Rome", "unit": "celsius", "days": 3, "code": "AB", "near": {"x": True}},
    {"city": 'a < b\n"quoted"', "days": 1},
    {"city": "", "days": 9, "near": {}},
]


@pytest.mark.parametrize("arguments", WEATHER_CALLS, ids=["all", "markup", "empty"])
@pytest.mark.parametrize("call_format", FORMATS, ids=lambda one: one.name)
def test_what_the_encoding_writes_is_what_the_grammar_allows(
    sampler: Sampler, call_format: CallFormat, arguments: dict[str, Any]
) -> None:
    if call_format.arguments == "dsml" and "code" in arguments:
        # A string with an expression is written as JSON, so that the expression holds.
        arguments = {name: value for name, value in arguments.items() if name != "code"}
    options = ChatOptions(tools=TOOLS, tool_choice=ToolChoice("required"))
    constraint = sampler.compiler.compile(built(sampler, options, call_format).text)
    text = call_format.render([ToolCall("call_0", "weather", json.dumps(arguments))])
    for token_id in sampler.tokenizer.encode(text, add_special_tokens=False).ids:
        constraint.accept(token_id)
    assert constraint.can_end


@pytest.mark.parametrize("call_format", FORMATS, ids=lambda one: one.name)
def test_a_named_tool_is_the_only_one_and_once_without_parallel_calls(
    sampler: Sampler, call_format: CallFormat
) -> None:
    options = ChatOptions(tools=TOOLS, tool_choice=ToolChoice("named", "kind"), parallel_tool_calls=False)
    grammar = built(sampler, options, call_format)
    for seed in range(10):
        text, is_over = sampler.draw(grammar, seed)
        assert is_over
        (call,) = calls_in(text, call_format)
        assert call.name == "kind"
        check([call])


def test_a_schema_with_tools_gives_calls_or_the_answer(sampler: Sampler) -> None:
    grammar = built(sampler, ChatOptions(tools=TOOLS), V4_CALLS, schema=SCHEMA)
    kinds: set[str] = set()
    for seed in range(40):
        text, is_over = sampler.draw(grammar, seed)
        if is_over and text.startswith("{"):
            AnswerSchema.from_json(SCHEMA, formats="assert", source="schema").check(text)
            kinds.add("answer")
        elif is_over:
            check(calls_in(text, V4_CALLS))
            kinds.add("calls")
    assert kinds == {"answer", "calls"}


def test_reasoning_comes_first_and_is_closed_at_its_budget(sampler: Sampler) -> None:
    options = ChatOptions(max_reasoning_tokens=7)
    grammar = built(sampler, options, None, schema=SCHEMA, starts_in_reasoning=True)
    for seed in range(10):
        text, is_over = sampler.draw(grammar, seed)
        assert is_over
        thoughts, end, answer = text.partition(THINK_END)
        assert end
        assert len(sampler.tokenizer.encode(thoughts, add_special_tokens=False).ids) <= 7 + 3
        AnswerSchema.from_json(SCHEMA, formats="assert", source="schema").check(answer)


def test_reasoning_without_a_budget_ends_when_it_likes(sampler: Sampler) -> None:
    grammar = built(sampler, ChatOptions(), None, schema=SCHEMA, starts_in_reasoning=True)
    constraint = sampler.compiler.compile(grammar.text)
    for token_id in sampler.tokenizer.encode("Let me see.\n\n1 < 2 {", add_special_tokens=False).ids:
        constraint.accept(token_id)
    close = sampler.tokenizer.token_to_id(THINK_END)
    assert close is not None
    constraint.accept(close)
    for token_id in sampler.tokenizer.encode('{"kind": "a", "level": 5}', add_special_tokens=False).ids:
        constraint.accept(token_id)
    assert constraint.can_end


def test_a_budget_alone_leaves_the_answer_free(sampler: Sampler) -> None:
    options = ChatOptions(max_reasoning_tokens=2, tools=TOOLS)
    grammar = built(sampler, options, V4_CALLS, starts_in_reasoning=True)
    constraint = sampler.compiler.compile(grammar.text)
    call = ToolCall("call_0", "kind", json.dumps({"kind": "a", "level": 1}))
    text = f"{THINK_END}Hello, you.{V4_CALLS.render([call])}"
    for token_id in sampler.tokenizer.encode(text, add_special_tokens=False).ids:
        constraint.accept(token_id)
    assert constraint.can_end


def test_strict_tools_hold_a_call_that_the_model_chooses_to_make(sampler: Sampler) -> None:
    strict = parse_tools([{"name": "kind", "parameters": SCHEMA, "strict": True}])
    options = ChatOptions(tools=strict)
    found = build_answer_grammar(
        options,
        schema=None,
        call_format=V4_CALLS.name,
        starts_in_reasoning=False,
        token_id=sampler.tokenizer.token_to_id,
    )
    assert found is not None
    constraint = sampler.compiler.compile(found.text)
    begin = f"Let me look.{V4_CALLS.begin}{V4_CALLS.call_begin('kind')}"
    for token_id in sampler.tokenizer.encode(begin, add_special_tokens=False).ids:
        constraint.accept(token_id)
    wrong = sampler.tokenizer.encode("other", add_special_tokens=False).ids[0]
    with pytest.raises(Exception, match=r"constrained decoding|token"):
        constraint.accept(wrong)


def test_nothing_is_constrained_where_any_text_is_an_answer(sampler: Sampler) -> None:
    token_id = sampler.tokenizer.token_to_id
    for options in (ChatOptions(), ChatOptions(tools=TOOLS), ChatOptions(tools=TOOLS, tool_choice=ToolChoice("none"))):
        for call_format in (None, V4_CALLS):
            assert (
                build_answer_grammar(
                    options,
                    schema=None,
                    call_format=call_format and call_format.name,
                    starts_in_reasoning=True,
                    token_id=token_id,
                )
                is None
            )


def test_equal_requests_give_equal_grammars(sampler: Sampler) -> None:
    options = ChatOptions(tools=TOOLS, tool_choice=ToolChoice("required"))
    assert built(sampler, options, V4_CALLS).text == built(sampler, options, V4_CALLS).text


def test_what_cannot_be_enforced_is_named_with_its_tool(sampler: Sampler) -> None:
    loose = {**SCHEMA, "properties": {**SCHEMA["properties"], "tags": {"type": "array", "uniqueItems": True}}}  # type: ignore[dict-item]
    options = ChatOptions(tools=parse_tools([{"name": "f", "parameters": loose}]), tool_choice=ToolChoice("required"))
    for call_format in (V4_CALLS, HERMES):
        relaxed = built(sampler, options, call_format).relaxed
        assert [(one.pointer, one.keyword) for one in relaxed] == [
            ("/tools/f/parameters/properties/tags", "uniqueItems")
        ]


def test_malformed_calls_are_the_parsers_not_the_grammars(sampler: Sampler) -> None:
    with pytest.raises(MalformedToolCall):
        V4_CALLS.parse(V4_CALLS.begin, 2)
