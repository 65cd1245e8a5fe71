"""Constrained decoding: which tokens a grammar lets a sequence take next, by llguidance, on CPU threads.

The only file of `model_runner/grammar/` that imports torch: its masks are tensors. A request's grammar (see
`moebeam.model_runner.grammar.answer_grammar`) is compiled once and copied for each sequence; while the forward pass of
a step runs, `MaskFiller` fills the masks that `sampler.sample` takes; the drawn token goes to `accept`.

    constraint = ConstraintCompiler(tokenizer, vocab_size, eos_token_ids).compile(grammar)
    pending = filler.start([constraint, None])
    logits = ...  # the forward pass
    drawn = sample(logits, draws, pending.result())
    constraint.accept(drawn[0].token_id)

A mask narrows tokens, never text: where the grammar leaves one continuation only, llguidance allows its canonical
tokens and not other spellings of the same bytes. Tokens like `<think>` are never text: an answer that holds these
letters spells them with ordinary tokens.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import tokenizers
import torch
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from torch import Tensor

from moebeam.model_runner.grammar.json_grammar import invalid_grammar
from moebeam.schemas.errors import EngineFailed, EngineLoadError, abbreviate

MAX_CACHED_GRAMMARS = 256
"""Compiled grammars that are kept; compiling again costs a few milliseconds."""

# Verbose errors quote what was generated, which belongs to the row and not to a log.
_LIMITS = LLParserLimits(verbose_errors=False)
_OWN_LIMITS = LLParserLimits(verbose_errors=False, initial_lexer_fuel=20_000_000, step_lexer_fuel=2_000_000)
"""Of a matcher that serves one sequence after the shared one failed: at most some 2 s to take its tokens again, and
0.2 s for a mask."""


def num_mask_words(vocab_size: int) -> int:
    """Words of 32 tokens each in the mask of one row."""
    return (vocab_size + 31) // 32


class ConstraintCompiler:
    """Compiles grammars for one tokenizer; not thread-safe."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Read the vocabulary; about a second for 129,000 tokens.

        Args:
            tokenizer: the model's; it is not changed.
            vocab_size: width of the model's logits; ids past the tokenizer's own are never allowed.
            eos_token_ids: the tokens that end an answer; each is allowed where the grammar can stop.
        Raises:
            EngineLoadError: the tokenizer has more tokens than the model, an end token is unknown to it, or llguidance
                cannot read it.
        """
        self.num_words = num_mask_words(vocab_size)
        try:
            self._tokenizer = LLTokenizer(
                _rename_special_tokens(tokenizer), n_vocab=vocab_size, eos_token=list(eos_token_ids)
            )
        except ValueError as error:
            raise EngineLoadError(
                f"expected a tokenizer of at most {vocab_size} tokens with end tokens {list(eos_token_ids)}, found one "
                f"of {tokenizer.get_vocab_size()} that constrained decoding cannot use: {error}"
            ) from error
        self._templates: OrderedDict[str, LLMatcher] = OrderedDict()

    def compile(self, grammar: str) -> "Constraint":
        """The constraint of a new sequence; a grammar seen lately is only copied.

        Copies share one lexer (llguidance 1.9.1), which allows nothing more once it met a limit, whichever copy led it
        there. A constraint whose matcher fails therefore goes on with a matcher of its own, and later sequences get a
        new template.

        Args:
            grammar: an llguidance grammar (JSON text, or its Lark). A token like `<think>` is named by number: `<[5]>`.
        Raises:
            InvalidGrammar: the grammar cannot be compiled.
        """
        template = self._templates.get(grammar)
        if template is None:
            template = self._templates[grammar] = self._make_matcher(grammar, _LIMITS)
            if len(self._templates) > MAX_CACHED_GRAMMARS:
                self._templates.popitem(last=False)
        self._templates.move_to_end(grammar)

        def compile_again() -> LLMatcher:
            if self._templates.get(grammar) is template:
                del self._templates[grammar]
            return self._make_matcher(grammar, _OWN_LIMITS)

        return Constraint(template.deep_copy(), self.num_words, compile_again)

    def _make_matcher(self, grammar: str, limits: LLParserLimits) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise invalid_grammar(matcher.get_error())
        return matcher


class Constraint:
    """One sequence's position in its grammar. Must not be used between `MaskFiller.start` and `PendingMasks.result`.

    Attributes:
        matcher: llguidance's state; for `MaskFiller` alone.
        num_words: words in a mask; the compiler's.
        is_filling: whether a mask is being filled from this state.
    """

    __slots__ = ("_accepted", "_compile_again", "is_filling", "matcher", "num_words")

    def __init__(
        self, matcher: LLMatcher, num_words: int, compile_again: Callable[[], LLMatcher] | None = None
    ) -> None:
        """Begin a sequence.

        Args:
            matcher: at the beginning of its grammar.
            compile_again: makes a matcher that shares nothing; None where a failure of `matcher` is final.
        """
        self.matcher = matcher
        self.num_words = num_words
        self.is_filling = False
        self._compile_again = compile_again
        self._accepted: list[int] = []

    def find_forced_token_ids(self) -> list[int]:
        """The tokens that must follow because the grammar leaves only one text; often none, never an end token.

        Does not accept them: the engine appends as many as it has room for and calls `accept` for each.
        """
        assert not self.is_filling, "the constraint was asked while its mask is being filled"
        forced = self.matcher.compute_ff_tokens()
        return self.matcher.compute_ff_tokens() if self.recover() else forced

    def recover(self) -> bool:
        """Go on with a matcher of its own where the shared one failed, perhaps by another sequence's answer.

        Returns:
            Whether the matcher was changed and has taken all tokens so far; False too where it had not failed.
        """
        if self._compile_again is None or not self.matcher.is_error():
            return False
        self.matcher, self._compile_again = self._compile_again(), None
        return self.matcher.consume_tokens(self._accepted)

    def accept(self, token_id: int) -> None:
        """Take the next token of the sequence, drawn or forced; end tokens included.

        Raises:
            EngineFailed: the grammar does not allow the token here, or it became too complex. The constraint has
                failed then and allows nothing more.
        """
        assert not self.is_filling, "a token was accepted while the mask is being filled"
        if not self.matcher.consume_token(token_id) and not (self.recover() and self.matcher.consume_token(token_id)):
            raise self.failure or EngineFailed(f"constrained decoding refused token {token_id}")
        self._accepted.append(token_id)

    @property
    def can_end(self) -> bool:
        """Whether the text so far is complete, so that an end token is allowed."""
        return self.failure is None and self.matcher.is_accepting()

    @property
    def is_over(self) -> bool:
        """Whether the text is complete and nothing but an end token may follow; or one has followed."""
        return self.failure is None and self.matcher.is_stopped()

    @property
    def failure(self) -> EngineFailed | None:
        """Why no token is allowed any more: llguidance exceeded a limit of its own, or was given a wrong token."""
        if not self.matcher.is_error():
            return None
        return EngineFailed(f"constrained decoding stopped: {abbreviate(self.matcher.get_error(), 200)}")


class PendingMasks:
    """Masks that other threads are filling."""

    __slots__ = ("_constrained", "_future", "_masks")

    def __init__(self, constrained: list[tuple[Constraint, int]], masks: Tensor | None, future: Future[None] | None):
        self._constrained = constrained
        self._masks = masks
        self._future = future

    def result(self) -> Tensor | None:
        """Waits for the masks; call it before using the constraints again, also after a failed forward pass.

        Returns:
            int32, on the CPU, shape (num_rows, num_words), as `sampler.sample` takes it; None when no row is
            constrained. Rows without constraint allow everything, rows whose constraint failed nothing.
        """
        if self._future is None or self._masks is None:
            return None
        try:
            self._future.result()
        finally:
            for constraint, _ in self._constrained:
                constraint.is_filling = False
        for constraint, row in self._constrained:
            if constraint.recover():
                fill_next_token_bitmask(constraint.matcher, self._masks.numpy(), row)
            if constraint.matcher.is_error():
                # llguidance allows the end token then, which would pass a broken answer off as complete.
                self._masks[row] = 0
        return self._masks


class MaskFiller:
    """Fills token masks on CPU threads while the forward pass runs.

    One thread hands a step's rows to llguidance's thread pool; neither holds the GIL meanwhile.
    """

    def __init__(self, vocab_size: int, *, num_threads: int | None = None, is_pinned: bool = False) -> None:
        """Start the threads.

        Args:
            vocab_size: width of the model's logits.
            num_threads: that fill masks; None takes 80% of the cores, at most 32.
            is_pinned: whether masks lie in pinned memory, from which an accelerator copies without waiting.
        """
        self.num_words = num_mask_words(vocab_size)
        self._is_pinned = is_pinned
        self._executor = LLExecutor(num_threads=num_threads)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fill-masks")

    def start(self, rows: Sequence[Constraint | None]) -> PendingMasks:
        """Begin to fill the masks of one step.

        Args:
            rows: for each row of the logits its constraint, having accepted all tokens so far, or None.
        """
        constrained = [(constraint, row) for row, constraint in enumerate(rows) if constraint is not None]
        if not constrained:
            return PendingMasks([], None, None)
        for constraint, _ in constrained:
            assert constraint.num_words == self.num_words, "the constraint was compiled for another vocabulary"
            assert not constraint.is_filling, "the mask of a constraint is being filled already"
            constraint.is_filling = True
        masks = torch.full((len(rows), self.num_words), -1, dtype=torch.int32, pin_memory=self._is_pinned)
        matchers = [(constraint.matcher, row) for constraint, row in constrained]
        future = self._thread.submit(fill_next_token_bitmask_par, self._executor, matchers, masks.numpy())
        return PendingMasks(constrained, masks, future)

    def close(self) -> None:
        """Stops the thread once pending masks are filled."""
        self._thread.shutdown()


def _rename_special_tokens(tokenizer: tokenizers.Tokenizer) -> str:
    """The tokenizer's JSON, its special tokens renamed to what no text spells.

    Where text is forced, llguidance 1.9.1 lets the tokenizer cut it into tokens, allows these alone and then refuses
    those that are special: of the schema `{"const": "<think>"}` no text could be generated.
    """
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    document["truncation"] = document["padding"] = None
    new_names: dict[str, str] = {}
    for token in document["added_tokens"]:
        name: str = token["content"]
        # llguidance takes any added token of this form for a special one.
        if token["special"] or (name.startswith("<") and name.endswith(">")):
            new_names[name] = token["content"] = f"\0{token['id']}\0"
            token["special"] = True
    model: dict[str, Any] = document["model"]
    vocab: dict[str, int] | list[tuple[str, float]] = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {new_names.get(name, name): token_id for name, token_id in vocab.items()}
    else:
        model["vocab"] = [(new_names.get(name, name), score) for name, score in vocab]
    if model.get("unk_token") is not None:
        model["unk_token"] = new_names.get(model["unk_token"], model["unk_token"])
    return json.dumps(document, ensure_ascii=False)
