"""Grammars against a JSON Schema validator: what a mask lets through is valid, and what is valid gets through."""

import json

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLParserLimits

from moebeam.model_runner.grammar import constraint as constraint_module
from moebeam.model_runner.grammar.constraint import Constraint, ConstraintCompiler, MaskFiller, num_mask_words
from moebeam.model_runner.grammar.json_grammar import json_schema_grammar
from moebeam.model_runner.torch_engine.sampler import Draw, sample
from moebeam.schemas.canonical import Json
from moebeam.schemas.contract.answer_schema import AnswerSchema
from moebeam.schemas.errors import EngineFailed, EngineLoadError, InvalidGrammar, RowError
from tests.support.models.tongues import DEMO_TOKENIZER, END, SCHEMAS, Tongue


def is_valid(schema: AnswerSchema, text: str) -> bool:
    try:
        schema.check(text)
    except RowError:
        return False
    return text == text.strip()


def copied(constraint: Constraint) -> Constraint:
    return Constraint(constraint.matcher.deep_copy(), constraint.num_words)


@pytest.mark.parametrize("name", SCHEMAS)
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**32))
def test_greedy_decoding_over_random_logits_gives_valid_text(tongue: Tongue, name: str, seed: int):
    schema = AnswerSchema.from_json(SCHEMAS[name][0], formats="assert", source=name)
    constraint = tongue.compile(SCHEMAS[name][0], max_whitespace=2)
    generator = torch.Generator().manual_seed(seed)
    token_ids: list[int] = []
    while not token_ids or token_ids[-1] != tongue.eos_token_id:
        pending = tongue.filler.start([constraint])
        logits = torch.randn(1, tongue.vocab_size, generator=generator)
        masks = pending.result()
        assert masks is not None
        can_end = masks[0, tongue.eos_token_id // 32].item() >> tongue.eos_token_id % 32 & 1
        assert bool(can_end) == constraint.can_end == is_valid(schema, tongue.text(token_ids))
        (drawn,) = sample(logits, [Draw()], masks)
        constraint.accept(drawn.token_id)
        token_ids.append(drawn.token_id)
        assert len(token_ids) < 1_000
    assert constraint.is_over
    assert is_valid(schema, tongue.text(token_ids))


@pytest.mark.parametrize("name", SCHEMAS)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_masks_allow_the_tokens_of_every_valid_text(tongue: Tongue, name: str, data: st.DataObject):
    schema, values = SCHEMAS[name]
    value = in_order(schema, data.draw(values))
    separators = data.draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t:  ")]))
    indent = data.draw(st.sampled_from([None, 0, 2]))
    text = json.dumps(value, ensure_ascii=False, separators=separators, indent=indent)
    constraint = tongue.compile(schema)
    for token_id in ordinary_token_ids(tongue, text):
        assert token_id in tongue.allowed(constraint)
        constraint.accept(token_id)
    assert tongue.eos_token_id in tongue.allowed(constraint)


def in_order(schema: Json, value: Json) -> Json:
    """An object with its properties in the schema's order, as grammars have them; other values as they are."""
    return {name: value[name] for name in schema["properties"] if name in value} if isinstance(value, dict) else value


def ordinary_token_ids(tongue: Tongue, text: str) -> list[int]:
    """The tokens of a text, special tokens' names spelled as any other text."""
    document = json.loads(tongue.tokenizer.to_str())
    document["added_tokens"] = []
    return tokenizers.Tokenizer.from_str(json.dumps(document)).encode(text).ids


@pytest.mark.parametrize("name", SCHEMAS)
@settings(deadline=None, max_examples=3)
@given(seed=st.integers(0, 2**32))
def test_a_mask_is_what_the_grammar_accepts_token_by_token(tongue: Tongue, name: str, seed: int):
    constraint = tongue.compile(SCHEMAS[name][0])
    random = np.random.default_rng(seed)
    for _ in range(12):
        allowed = tongue.allowed(constraint)
        allowed.discard(tongue.eos_token_id)
        ordinary = set(range(tongue.vocab_size)) - {tongue.eos_token_id}
        accepted = {token_id for token_id in ordinary if constraint.matcher.validate_tokens([token_id])}
        # Only where one text is forced may a mask leave out other spellings of it.
        assert allowed == accepted or (constraint.matcher.compute_ff_bytes() and allowed < accepted)
        if not allowed:
            return
        constraint.accept(int(random.choice(sorted(allowed))))


@pytest.mark.parametrize("name", SCHEMAS)
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**32))
def test_forced_tokens_are_the_only_ones_that_masks_allow(tongue: Tongue, name: str, seed: int):
    schema = AnswerSchema.from_json(SCHEMAS[name][0], formats="assert", source=name)
    constraint = tongue.compile(SCHEMAS[name][0], max_whitespace=2)
    random = np.random.default_rng(seed)
    token_ids: list[int] = []
    while not constraint.is_over:
        for token_id in constraint.find_forced_token_ids():
            assert tongue.allowed(constraint) == {token_id}
            constraint.accept(token_id)
            token_ids.append(token_id)
        if not constraint.is_over:
            token_ids.append(int(random.choice(sorted(tongue.allowed(constraint)))))
            constraint.accept(token_ids[-1])
        assert len(token_ids) < 1_000
    assert is_valid(schema, tongue.text(token_ids))


def test_most_of_a_rigid_answer_is_forced(demo: Tongue):
    schema: Json = {
        "type": "object",
        "properties": {"refund_requested": {"type": "boolean"}},
        "required": ["refund_requested"],
        "additionalProperties": False,
    }
    constraint = demo.compile(schema, max_whitespace=0)
    assert demo.text(constraint.find_forced_token_ids()).startswith('{"refund_requested')


def test_forcing_accepts_nothing_by_itself(demo: Tongue):
    constraint = demo.compile({"const": "abc"})
    assert constraint.find_forced_token_ids() == constraint.find_forced_token_ids() != []
    for token_id in constraint.find_forced_token_ids():
        constraint.accept(token_id)
    assert constraint.find_forced_token_ids() == []
    assert constraint.is_over


def test_names_of_special_tokens_are_spelled_as_text(demo: Tongue):
    text = f"a<think>b{END}"
    constraint = demo.compile({"const": text})
    forced = constraint.find_forced_token_ids()
    assert not {demo.tokenizer.token_to_id("<think>"), demo.eos_token_id} & set(forced)
    assert json.loads(demo.text(forced)) == text


def test_added_tokens_that_look_special_are_spelled_as_text_too():
    tokenizer = tokenizers.Tokenizer.from_file(str(DEMO_TOKENIZER))
    tokenizer.add_tokens([tokenizers.AddedToken("<tool>", special=False)])
    before = tokenizer.to_str()
    tongue = Tongue(tokenizer, 1)
    forced = tongue.compile({"const": "a<tool>"}).find_forced_token_ids()
    tongue.filler.close()
    assert tokenizer.token_to_id("<tool>") not in forced
    assert tokenizer.decode(forced) == '"a<tool>"'
    assert tokenizer.to_str() == before


def test_an_ended_sequence_is_over_and_one_that_can_go_on_is_not(demo: Tongue):
    constraint = demo.compile({"type": "integer"})
    assert not constraint.can_end
    constraint.accept(demo.tokenizer.token_to_id("7"))
    assert constraint.can_end
    assert not constraint.is_over
    constraint.accept(demo.eos_token_id)
    assert constraint.is_over


def test_every_end_token_is_allowed_where_the_grammar_can_stop(demo: Tongue):
    end_tokens = {1, 4}
    compiler = ConstraintCompiler(demo.tokenizer, demo.vocab_size, sorted(end_tokens))
    constraint = compiler.compile(json_schema_grammar({"type": "boolean"}))
    assert not demo.allowed(constraint) & end_tokens
    for token_id in demo.tokenizer.encode("true").ids:
        constraint.accept(token_id)
    assert demo.allowed(constraint) == end_tokens
    for end_token in end_tokens:
        ended = copied(constraint)
        ended.accept(end_token)
        assert ended.is_over


def test_a_wrong_token_breaks_its_row_only(demo: Tongue):
    broken, whole = demo.compile({"type": "integer"}), demo.compile({"type": "integer"})
    with pytest.raises(EngineFailed, match="constrained decoding"):
        broken.accept(demo.tokenizer.token_to_id('"'))
    assert broken.failure is not None
    assert not (broken.can_end or broken.is_over)
    masks = demo.filler.start([broken, whole]).result()
    assert masks is not None
    found = sample(torch.zeros(2, demo.vocab_size), [Draw(), Draw()], masks)
    assert [drawn.is_broken for drawn in found] == [True, False]
    assert whole.failure is None


def test_a_grammar_too_complex_for_its_limits_ends_no_answer(demo: Tongue, monkeypatch: pytest.MonkeyPatch):
    for name in ("_LIMITS", "_OWN_LIMITS"):
        monkeypatch.setattr(constraint_module, name, LLParserLimits(step_lexer_fuel=1))
    compiler = ConstraintCompiler(demo.tokenizer, demo.vocab_size, [demo.eos_token_id])
    grammar = json_schema_grammar({"type": "string", "pattern": "^(a|b){1,50}c.*$"})
    constraint = compiler.compile(grammar)
    constraint.accept(demo.tokenizer.token_to_id('"'))
    assert demo.allowed(constraint) == set()
    assert constraint.failure is not None
    assert constraint.find_forced_token_ids() == []


def test_an_end_token_is_refused_before_the_grammar_can_stop(demo: Tongue):
    constraint = demo.compile({"type": "integer"})
    with pytest.raises(EngineFailed):
        constraint.accept(demo.eos_token_id)


def test_sequences_of_one_grammar_share_the_work_but_not_the_state(demo: Tongue, monkeypatch: pytest.MonkeyPatch):
    compiled: list[str] = []
    real = constraint_module.LLMatcher

    def counting(tokenizer: object, grammar: str, **options: object) -> object:
        compiled.append(grammar)
        return real(tokenizer, grammar, **options)

    grammar = json_schema_grammar({"enum": ["a", "b"]})
    monkeypatch.setattr(constraint_module, "LLMatcher", counting)
    compiler = ConstraintCompiler(demo.tokenizer, demo.vocab_size, [demo.eos_token_id])
    first, second = compiler.compile(grammar), compiler.compile(grammar)
    assert compiled == [grammar]
    for token_id in demo.tokenizer.encode('"a"').ids:
        first.accept(token_id)
    assert first.is_over
    for token_id in demo.tokenizer.encode('"b"').ids:
        second.accept(token_id)
    assert second.is_over


def test_rows_without_constraint_allow_everything(demo: Tongue):
    constraint = demo.compile({"type": "boolean"})
    masks = demo.filler.start([None, constraint, None]).result()
    assert masks is not None
    assert masks.dtype == torch.int32
    assert tuple(masks.shape) == (3, num_mask_words(demo.vocab_size))
    assert masks[0].eq(-1).all()
    assert masks[2].eq(-1).all()
    assert not masks[1].eq(-1).any()


@pytest.mark.parametrize("rows", [[], [None], [None, None]])
def test_no_constraint_needs_no_mask(demo: Tongue, rows: list[None]):
    assert demo.filler.start(rows).result() is None


def test_a_constraint_is_left_alone_while_its_mask_is_filled(demo: Tongue):
    constraint = demo.compile({"type": "integer"})
    pending = demo.filler.start([constraint])
    with pytest.raises(AssertionError, match="being filled"):
        constraint.accept(demo.tokenizer.token_to_id("7"))
    with pytest.raises(AssertionError, match="being filled"):
        constraint.find_forced_token_ids()
    with pytest.raises(AssertionError, match="being filled"):
        demo.filler.start([constraint])
    masks = pending.result()
    assert masks is not None
    assert torch.equal(masks, pending.result())
    constraint.accept(demo.tokenizer.token_to_id("7"))


def test_a_model_wider_than_its_tokenizer_never_gets_the_tokens_between(demo: Tongue):
    vocab_size = demo.vocab_size + 100
    compiler = ConstraintCompiler(demo.tokenizer, vocab_size, [demo.eos_token_id])
    filler = MaskFiller(vocab_size, num_threads=1)
    constraint = compiler.compile("start: /(.|\\n)*/")
    masks = filler.start([constraint]).result()
    filler.close()
    assert masks is not None
    allowed = np.flatnonzero(np.unpackbits(masks.numpy().view(np.uint8), bitorder="little"))
    assert len(allowed) > 1_000
    assert allowed.max() < demo.vocab_size


@pytest.mark.parametrize(("vocab_size", "eos_token_ids"), [(1_000, [1]), (1_733, []), (1_733, [5_000])])
def test_a_tokenizer_that_does_not_fit_the_model_cannot_be_loaded(
    demo: Tongue, vocab_size: int, eos_token_ids: list[int]
):
    with pytest.raises(EngineLoadError, match="end tokens"):
        ConstraintCompiler(demo.tokenizer, vocab_size, eos_token_ids)


@pytest.mark.parametrize("grammar", ["", "{}", "not a grammar", '{"grammars":[]}', 'start: <think> "x"'])
def test_text_that_is_no_grammar_is_refused(demo: Tongue, grammar: str):
    with pytest.raises(InvalidGrammar, match="expected"):
        demo.compiler.compile(grammar)


def test_a_grammar_names_a_special_token_by_number(demo: Tongue):
    think = demo.tokenizer.token_to_id("<think>")
    constraint = demo.compiler.compile(f'start: <[{think}]> "x"')
    assert demo.allowed(constraint) == {think}
    constraint.accept(think)
    assert demo.text(constraint.find_forced_token_ids()) == "x"
