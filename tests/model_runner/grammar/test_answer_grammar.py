"""Whole-answer grammars: what each choice of tools, form and thinking lets through, and what it says of itself."""

# ruff: noqa: RUF001 - the bars of the wire format are U+FF5C

import json
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers

from moebeam.model_runner.grammar.answer_grammar import CALL_FORMATS, BuiltGrammar, build_answer_grammar
from moebeam.model_runner.grammar.constraint import Constraint, ConstraintCompiler
from moebeam.model_runner.grammar.json_grammar import enforceable_schema, json_schema_grammar
from moebeam.schemas.canonical import Json
from moebeam.schemas.chat_options import ChatOptions, ResponseFormat, ToolChoice, parse_tools
from moebeam.schemas.errors import EngineFailed, InvalidGrammar
from moebeam.schemas.records import ToolCall
from tests.support.models.checkpoints import EOS
from tests.support.models.grammar_sampling import byte_tokenizer

MARKUP = sorted({"</think>", "<think>", *(text for known in CALL_FORMATS.values() for text in known.markup)})
SCHEMA: Json = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
WEATHER: Json = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["celsius", "fahrenheit", None]},
        "code": {"type": "string", "pattern": "^[A-Z]{2}$"},
        "day": {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 1}]},
        "any": {},
        "near": {"$ref": "#/$defs/place"},
    },
    "required": ["city"],
    "$defs": {
        "place": {"type": "object", "properties": {"x": {"$ref": "#/$defs/place"}}, "additionalProperties": False}
    },
}
TOOLS = parse_tools([{"name": "weather", "parameters": WEATHER}, {"name": "now"}, {"name": "free", "parameters": {}}])
STRICT = parse_tools([{"name": "now", "strict": True}])


class Reader:
    """Asks grammars whether they allow a text, for a tokenizer of bytes with or without tokens for the markup."""

    def __init__(self, has_tokens: bool) -> None:
        self.has_tokens = has_tokens
        self.tokenizer = tokenizers.Tokenizer.from_str(byte_tokenizer().to_str())
        if has_tokens:
            self.tokenizer.add_special_tokens(MARKUP)
        size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        self.compiler = ConstraintCompiler(self.tokenizer, size, [self.tokenizer.token_to_id(EOS)])

    def allows(self, built: BuiltGrammar, text: str) -> bool:
        constraint = self.compiler.compile(built.text)
        return self.reads(constraint, text) and constraint.can_end

    def reads(self, constraint: Constraint, text: str) -> bool:
        for token_id in self.tokenizer.encode(text, add_special_tokens=False).ids:
            try:
                constraint.accept(token_id)
            except EngineFailed:
                return False
        return True

    def build(self, options: ChatOptions, call_format: str | None = None, **changes: Any) -> BuiltGrammar:
        found = self.maybe(options, call_format, **changes)
        assert found is not None
        return found

    def maybe(self, options: ChatOptions, call_format: str | None = None, **changes: Any) -> BuiltGrammar | None:
        values: dict[str, Any] = {"schema": None, "starts_in_reasoning": False, **changes}
        return build_answer_grammar(options, call_format=call_format, token_id=self.tokenizer.token_to_id, **values)


@pytest.fixture(scope="module", params=[True, False], ids=["tokens", "spelled"])
def reader(request: pytest.FixtureRequest) -> Reader:
    return Reader(request.param)


def calls_text(call_format: str, *calls: tuple[str, dict[str, Json]]) -> str:
    written = [ToolCall(f"call_{index}", name, json.dumps(found)) for index, (name, found) in enumerate(calls)]
    return CALL_FORMATS[call_format].render(written)


formats = pytest.mark.parametrize("call_format", CALL_FORMATS)


def test_a_schema_alone_is_its_own_grammar(reader: Reader) -> None:
    built = reader.build(ChatOptions(), schema=SCHEMA)
    assert built.text == json_schema_grammar(enforceable_schema(SCHEMA).document)
    assert built.relaxed == ()


def test_the_response_format_counts_where_no_schema_is_given(reader: Reader) -> None:
    by_format = ChatOptions(response_format=ResponseFormat("json_schema", SCHEMA))
    assert reader.build(by_format) == reader.build(ChatOptions(), schema=SCHEMA)
    built = reader.build(ChatOptions(response_format=ResponseFormat("json_object")))
    assert reader.allows(built, '{"a": [1]}')
    assert not reader.allows(built, "[1]")


@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [
        ('why?\n\nbecause <x></think>{"n": 1}', True),
        ('</think>\n\n{"n": 1}', True),
        ('</think> {"n": 1}', False),
        ('{"n": 1}', False),
        ("x</think>", False),
        ('x</think>y</think>{"n": 1}', False),
    ],
)
def test_reasoning_is_any_text_up_to_its_end(reader: Reader, text: str, is_allowed: bool) -> None:
    built = reader.build(ChatOptions(), schema=SCHEMA, starts_in_reasoning=True)
    assert reader.allows(built, text) == is_allowed


@pytest.mark.parametrize("schema", [None, SCHEMA])
def test_reasoning_must_end_when_its_budget_is_used_up(reader: Reader, schema: Json) -> None:
    # Without a token for the end, four characters count as a token.
    longest = "abcde" if reader.has_tokens else "abcde" * 4
    built = reader.build(ChatOptions(max_reasoning_tokens=5), schema=schema, starts_in_reasoning=True)
    constraint = reader.compiler.compile(built.text)
    assert reader.reads(constraint, longest)
    forced = reader.tokenizer.decode(constraint.find_forced_token_ids(), skip_special_tokens=False)
    assert forced.startswith("</think>")
    assert not reader.allows(built, f'{longest}f</think>{{"n": 1}}')
    assert reader.allows(built, f'{longest}</think>{{"n": 1}}')
    assert reader.allows(built, 'abc</think>{"n": 1}')


def test_a_budget_leaves_the_answer_behind_it_free(reader: Reader) -> None:
    built = reader.build(ChatOptions(max_reasoning_tokens=5), starts_in_reasoning=True)
    assert reader.allows(built, "abc</think>any\ntext é")
    assert reader.allows(built, "abc</think>")


@formats
def test_demanded_calls_come_alone(reader: Reader, call_format: str) -> None:
    built = reader.build(ChatOptions(tools=TOOLS, tool_choice=ToolChoice("required")), call_format)
    one = calls_text(call_format, ("now", {}))
    two = calls_text(call_format, ("weather", {"city": "x"}), ("now", {}))
    assert reader.allows(built, one)
    assert reader.allows(built, two)
    assert not reader.allows(built, f"text{one}")
    assert not reader.allows(built, f"{one}text")
    assert not reader.allows(built, "text")
    assert not reader.allows(built, calls_text(call_format, ("other", {})))


@formats
def test_one_call_is_the_most_without_parallel_calls(reader: Reader, call_format: str) -> None:
    choice = ToolChoice("required")
    built = reader.build(ChatOptions(tools=TOOLS, tool_choice=choice, parallel_tool_calls=False), call_format)
    assert reader.allows(built, calls_text(call_format, ("now", {})))
    assert not reader.allows(built, calls_text(call_format, ("now", {}), ("now", {})))


@formats
def test_a_named_tool_is_the_only_one(reader: Reader, call_format: str) -> None:
    built = reader.build(ChatOptions(tools=TOOLS, tool_choice=ToolChoice("named", "now")), call_format)
    assert reader.allows(built, calls_text(call_format, ("now", {})))
    assert not reader.allows(built, calls_text(call_format, ("weather", {"city": "x"})))


@formats
def test_strict_tools_may_be_called_after_any_text(reader: Reader, call_format: str) -> None:
    built = reader.build(ChatOptions(tools=STRICT), call_format)
    call = calls_text(call_format, ("now", {}))
    for text in ("", "text only\n\n", f"text{call}", call, f"a < b\n\nc{call}"):
        assert reader.allows(built, text), text
    assert not reader.allows(built, f"{call}{call}more")
    assert not reader.allows(built, f"text{call[:-3]}")


@formats
def test_with_a_schema_an_answer_is_calls_or_json(reader: Reader, call_format: str) -> None:
    built = reader.build(ChatOptions(tools=TOOLS), call_format, schema=SCHEMA)
    call = calls_text(call_format, ("now", {}))
    assert reader.allows(built, '{"n": 1}')
    assert reader.allows(built, call)
    assert not reader.allows(built, f'{{"n": 1}}{call}')
    assert not reader.allows(built, "text")


@formats
def test_calls_come_after_reasoning(reader: Reader, call_format: str) -> None:
    options = ChatOptions(tools=TOOLS, tool_choice=ToolChoice("required"), max_reasoning_tokens=9)
    built = reader.build(options, call_format, starts_in_reasoning=True)
    call = calls_text(call_format, ("now", {}))
    assert reader.allows(built, f"hm</think>{call}")
    assert not reader.allows(built, call)


ARGUMENTS: list[tuple[dict[str, Json], bool]] = [
    ({"city": "Rome"}, True),
    ({"city": 'a "quoted" < b > c\n</x> é'}, True),
    ({"city": "", "unit": "celsius", "day": 3, "near": {"x": {}}}, True),
    ({"city": "x", "unit": None, "day": "monday", "any": [1, "a"], "near": {}}, True),
    ({"city": "x", "any": "text"}, True),
    ({}, False),
    ({"city": 1}, False),
    ({"city": "x", "unit": "kelvin"}, False),
    ({"city": "x", "day": 0}, False),
    ({"city": "x", "near": {"y": 1}}, False),
]


@formats
@pytest.mark.parametrize(("arguments", "is_allowed"), ARGUMENTS)
def test_arguments_keep_their_schema(
    reader: Reader, call_format: str, arguments: dict[str, Json], is_allowed: bool
) -> None:
    built = reader.build(ChatOptions(tools=TOOLS, tool_choice=ToolChoice("named", "weather")), call_format)
    assert reader.allows(built, calls_text(call_format, ("weather", arguments))) == is_allowed


def test_a_string_with_conditions_is_json_for_dsml(reader: Reader) -> None:
    built = reader.build(ChatOptions(tools=TOOLS, tool_choice=ToolChoice("named", "weather")), "deepseek_v4")
    text = calls_text("deepseek_v4", ("weather", {"city": "x", "day": "AB"})).replace('name="day"', 'name="code"')
    assert 'string="true">AB<' in text
    assert not reader.allows(built, text)
    assert reader.allows(built, text.replace('string="true">AB<', 'string="false">"AB"<'))
    assert not reader.allows(built, text.replace('string="true">AB<', 'string="false">"AB1"<'))


def test_raw_strings_cannot_hold_markup(reader: Reader) -> None:
    built = reader.build(ChatOptions(tools=TOOLS, tool_choice=ToolChoice("named", "weather")), "deepseek_v4")
    text = calls_text("deepseek_v4", ("weather", {"city": "CITY"}))
    assert reader.allows(built, text)
    assert not reader.allows(built, text.replace("CITY", "a<｜DSML｜invoke"))


@formats
def test_arguments_without_a_schema_are_any_parameters(reader: Reader, call_format: str) -> None:
    built = reader.build(ChatOptions(tools=TOOLS, tool_choice=ToolChoice("named", "free")), call_format)
    for arguments in ({}, {"a": 1}, {"a": "text", "b": {"c": [None]}}):
        assert reader.allows(built, calls_text(call_format, ("free", arguments)))


def test_what_a_tool_leaves_to_validation_is_named(reader: Reader) -> None:
    unique: Json = {"properties": {"a": {"type": "array", "uniqueItems": True}}}
    impossible: Json = {"properties": {"a": False}, "required": ["a"]}
    tools = parse_tools([{"name": "f", "parameters": unique}, {"name": "g", "parameters": impossible}])
    built = reader.build(ChatOptions(tools=tools, tool_choice=ToolChoice("required")), "deepseek_v4")
    assert {(entry.pointer, entry.keyword) for entry in built.relaxed} == {
        ("/tools/f/parameters/properties/a", "uniqueItems"),
        ("/tools/g/parameters", "type"),
    }
    relaxed = reader.build(ChatOptions(), schema={"type": "array", "uniqueItems": True}).relaxed
    assert [(entry.pointer, entry.keyword) for entry in relaxed] == [("", "uniqueItems")]


def test_a_schema_that_no_answer_keeps_is_refused(reader: Reader) -> None:
    with pytest.raises(InvalidGrammar):
        reader.build(ChatOptions(), schema=False)


@pytest.mark.parametrize(
    "options",
    [
        ChatOptions(),
        ChatOptions(tools=TOOLS),
        ChatOptions(tools=TOOLS, tool_choice=ToolChoice("none")),
        ChatOptions(tools=STRICT, tool_choice=ToolChoice("none")),
        ChatOptions(max_reasoning_tokens=5),
    ],
)
def test_there_is_no_grammar_where_any_text_is_an_answer(reader: Reader, options: ChatOptions) -> None:
    assert reader.maybe(options, "deepseek_v4") is None


def test_tools_that_the_model_has_no_way_to_call_do_not_count(reader: Reader) -> None:
    assert reader.maybe(ChatOptions(tools=TOOLS, tool_choice=ToolChoice("required")), None) is None


@formats
def test_equal_requests_have_equal_texts(call_format: str) -> None:
    def build(token_id: Callable[[str], int | None]) -> BuiltGrammar | None:
        options = ChatOptions(tools=TOOLS, max_reasoning_tokens=7)
        return build_answer_grammar(
            options, schema=SCHEMA, call_format=call_format, starts_in_reasoning=True, token_id=token_id
        )

    assert build({"</think>": 9}.get) == build({"</think>": 9}.get)
    assert build({"</think>": 9}.get) != build({"</think>": 8}.get)


def test_a_grammar_is_one_lark_text_as_vllm_takes_it(reader: Reader) -> None:
    built = reader.build(ChatOptions(tools=TOOLS, tool_choice=ToolChoice("required")), "deepseek_v4")
    (grammar,) = json.loads(built.text)["grammars"]
    assert grammar.keys() == {"lark_grammar"}
    assert grammar["lark_grammar"].startswith("start: ")
