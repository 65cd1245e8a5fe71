import pickle

import pytest

from moebeam.schemas.chat_options import ChatOptions, ResponseFormat, ToolChoice, options_json, parse_tools
from moebeam.schemas.contract.answer_schema import AnswerSchema
from moebeam.schemas.errors import (
    InvalidResponseFormat,
    InvalidTools,
    JobFileError,
    MissingToolCall,
    ToolArgumentsInvalid,
)
from moebeam.schemas.records import ToolCall
from moebeam.transforms.render.answer_terms import AnswerTerms, TermsCache

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = parse_tools([{"name": "weather", "parameters": CITY}, {"name": "time"}])


def terms(choice: ToolChoice | None = None, *, is_parallel: bool = True) -> AnswerTerms:
    options = ChatOptions(tools=TOOLS, tool_choice=choice or ToolChoice(), parallel_tool_calls=is_parallel)
    return TermsCache(options, None).find(None)


def call(name: str = "weather", arguments: str = '{"city": "Rome"}') -> ToolCall:
    return ToolCall("call_0", name, arguments)


def test_calls_that_keep_their_schemas_are_accepted() -> None:
    terms().check_calls((call(), call("time", "{}")))
    terms().check_calls(())


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (call("wether"), r"tool_calls\[0\]: expected weather, time, found 'wether'"),
        (call(arguments='{"city": 5}'), r"tool_calls\[0\] weather: at /city"),
        (call(arguments="{}"), "city"),
        (call(arguments='{"city": '), r"tool_calls\[0\] weather"),
        (call("time", '{"zone": 1}'), "time"),
    ],
)
def test_calls_that_break_them_are_named(found: ToolCall, message: str) -> None:
    with pytest.raises(ToolArgumentsInvalid, match=message):
        terms().check_calls((found,))


@pytest.mark.parametrize("arguments", ["", " \n"])
def test_empty_arguments_are_an_empty_object_where_the_tool_needs_none(arguments: str) -> None:
    calls = (call(arguments=arguments), call("time", arguments), call("wether", arguments), call("time", "{"))
    weather, time, unknown, broken = terms().fill_arguments(calls)
    assert time == call("time", "{}")
    assert (weather, unknown, broken) == (calls[0], calls[2], calls[3])
    terms().check_calls((time,))
    with pytest.raises(ToolArgumentsInvalid, match="weather: expected JSON, found"):
        terms().check_calls((weather,))


@pytest.mark.parametrize(
    ("thinking", "effort", "expected"),
    [(None, None, False), (True, None, True), (False, "high", False), (None, "high", True), (None, "none", False)],
)
def test_reasoning_is_asked_for_by_thinking_or_by_an_effort(
    thinking: bool | None, effort: str | None, expected: bool
) -> None:
    options = ChatOptions(thinking=thinking, reasoning_effort=effort)
    assert TermsCache(options, None).find(None).asks_for_reasoning == expected


def test_a_choice_binds_the_answer() -> None:
    for choice in (ToolChoice("required"), ToolChoice("named", "time")):
        with pytest.raises(MissingToolCall):
            terms(choice).check_calls(())
    with pytest.raises(ToolArgumentsInvalid, match="expected time, found 'weather'"):
        terms(ToolChoice("named", "time")).check_calls((call(),))
    with pytest.raises(MissingToolCall, match="found 2"):
        terms(is_parallel=False).check_calls((call(), call()))


def test_rows_bring_terms_of_their_own_and_others_keep_the_jobs() -> None:
    number = AnswerSchema.from_json({"type": "integer"}, formats="assert", source="number.json")
    job = ChatOptions(response_format=ResponseFormat("json_schema", number.document))
    book: TermsCache = pickle.loads(pickle.dumps(TermsCache(job, number)))
    assert book.find(None).schema is book.schema
    assert book.find(options_json(ChatOptions())).schema is None
    own = book.find(options_json(ChatOptions(response_format=ResponseFormat("json_object")))).schema
    assert own is not None
    assert own.check('{"a": 1}') == {"a": 1}
    # The job's own schema stays the job's, pydantic model and all, where a row only says something else.
    thinking = ChatOptions(response_format=job.response_format, thinking=True)
    assert book.find(options_json(thinking)).schema is book.schema


def test_terms_that_cannot_be_compiled_are_the_rows_error() -> None:
    book = TermsCache(ChatOptions(), None)
    bad = ChatOptions(response_format=ResponseFormat("json_schema", {"type": "strin"}))
    with pytest.raises(InvalidResponseFormat, match="response_format: "):
        book.find(options_json(bad))
    with pytest.raises(InvalidTools, match="tool f"):
        book.find(options_json(ChatOptions(tools=parse_tools([{"name": "f", "parameters": {"type": "strin"}}]))))


def test_a_schema_that_takes_too_much_is_tried_once_for_all_rows_that_bring_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def load(schema: object, *, source: str, **_: object) -> None:
        tried.append(source)
        raise JobFileError(f"{source}: expected at most 2 s of processor time, found more")

    monkeypatch.setattr("moebeam.transforms.render.answer_terms.load_schema", load)
    book = TermsCache(ChatOptions(), None)
    options = options_json(ChatOptions(response_format=ResponseFormat("json_schema", {"pattern": "x"})))
    for _ in range(3):
        with pytest.raises(InvalidResponseFormat, match="processor time"):
            book.find(options)
    assert tried == ["response_format"]


def test_few_large_schemas_are_kept_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moebeam.transforms.render.answer_terms.MAX_COMPILED_CHARACTERS", 500)
    book = TermsCache(ChatOptions(), None)
    texts = [
        options_json(
            ChatOptions(response_format=ResponseFormat("json_schema", {"title": "x" * 200, "minLength": number}))
        )
        for number in range(3)
    ]
    first = book.find(texts[0])
    assert book.find(texts[0]) is first
    for text in texts:
        book.find(text)
    assert book.find(texts[0]) is not first
