"""One answer that meets a limit of llguidance's lexer ends no other, and strings that would meet it are named."""

import json

import pytest
from llguidance import LLParserLimits

from moebeam.model_runner.grammar import constraint as constraint_module
from moebeam.model_runner.grammar.constraint import Constraint, ConstraintCompiler, MaskFiller
from moebeam.model_runner.grammar.json_grammar import enforceable_schema, json_schema_grammar
from moebeam.schemas.canonical import Json
from moebeam.schemas.errors import EngineFailed
from tests.support.models.checkpoints import EOS
from tests.support.models.grammar_sampling import allows_value, byte_tokenizer, draw

WORDS = r"^(?:\S+\s+){0,49}\S+$"
FIFTY_WORDS: Json = {
    "type": "object",
    "properties": {"s": {"type": "string", "pattern": WORDS, "maxLength": 500}},
    "required": ["s"],
    "additionalProperties": False,
}
LONG = json.dumps(
    {"s": "Monday to Friday, 9am to 5pm, on Saturdays by appointment, closed on public holidays " * 2 + "x"}
)
NO_RESCUE = LLParserLimits(verbose_errors=False)


def make_compiler() -> ConstraintCompiler:
    tokenizer = byte_tokenizer()
    return ConstraintCompiler(tokenizer, tokenizer.get_vocab_size(), [tokenizer.token_to_id(EOS)])


def feed(constraint: Constraint, text: str) -> None:
    for token_id in byte_tokenizer().encode(text, add_special_tokens=False).ids:
        constraint.accept(token_id)


def test_an_answer_that_exhausts_the_lexer_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    # With no more fuel than the first attempt had, the long answer itself fails.
    monkeypatch.setattr(constraint_module, "_OWN_LIMITS", NO_RESCUE)
    compiler, grammar = make_compiler(), json_schema_grammar(FIFTY_WORDS)
    short = compiler.compile(grammar)
    feed(short, '{"s": "two')
    with pytest.raises(EngineFailed):
        feed(compiler.compile(grammar), LONG)
    feed(short, ' words"}')
    assert short.can_end
    later = compiler.compile(grammar)
    feed(later, '{"s": "two words"}')
    assert later.can_end


def test_an_answer_that_exhausts_the_shared_lexer_goes_on_with_its_own() -> None:
    constraint = make_compiler().compile(json_schema_grammar(FIFTY_WORDS))
    feed(constraint, LONG)
    assert constraint.can_end


def test_masks_are_filled_by_a_matcher_of_its_own_where_the_shared_one_failed() -> None:
    compiler, grammar = make_compiler(), json_schema_grammar(FIFTY_WORDS)
    short, long = compiler.compile(grammar), compiler.compile(grammar)
    feed(short, '{"s": "two')
    feed(long, LONG)
    filler = MaskFiller(byte_tokenizer().get_vocab_size())
    masks = filler.start([short]).result()
    filler.close()
    assert masks is not None
    quote = byte_tokenizer().encode('"', add_special_tokens=False).ids[0]
    assert (int(masks[0, quote // 32]) >> (quote % 32)) & 1
    assert short.failure is None


def test_a_wrong_token_is_refused_for_good() -> None:
    compiler = make_compiler()
    constraint = compiler.compile(json_schema_grammar({"type": "boolean"}))
    for _ in range(2):
        with pytest.raises(EngineFailed):
            feed(constraint, "x")
    assert not constraint.can_end


@pytest.mark.parametrize(
    ("pattern", "max_length", "expected"),
    [
        (WORDS, 500, {"maxLength"}),
        (r"^$|(^(?:\S+\s+){0,99}\S+$)", 5000, {"maxLength"}),
        (WORDS, None, set()),
        (r"^[a-z]{3,40}$", 50, set()),
        (r"^[^,]+(,[^,]+){0,20}$", 300, set()),
        (r"\S", 2000, set()),
    ],
)
def test_a_string_that_overtaxes_a_lexer_is_relaxed_and_named(
    pattern: str, max_length: int | None, expected: set[str]
) -> None:
    schema: dict[str, Json] = {"type": "string", "pattern": pattern}
    if max_length is not None:
        schema["maxLength"] = max_length
    assert {entry.keyword for entry in enforceable_schema(schema).relaxed} == expected
    assert len(draw(schema, 0, 4)) == 4
    assert allows_value(schema, "abcd")
