"""Caches the grammars that a job's answers are decoded under, one for each kind of request.

Part of *answer*: in-process engines get them with their requests (`Request.grammar`).
"""

from dataclasses import dataclass, field

from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from moebeam.model_runner.grammar.answer_grammar import BuiltGrammar
from moebeam.model_runner.grammar.fenced_grammar import make_answer_grammar
from moebeam.schemas.errors import InvalidGrammar
from moebeam.schemas.records import TokenIds
from moebeam.transforms.render.answer_terms import MAX_COMPILED, MAX_COMPILED_CHARACTERS, AnswerTerms


@dataclass(slots=True)
class GrammarCache:
    """Grammars for one encoding and its tokenizer."""

    encoder: PromptEncoder
    _texts: dict[tuple[str | None, bool], str | None] = field(default_factory=dict[tuple[str | None, bool], str | None])
    _num_characters: int = 0

    def get(self, options: str | None, terms: AnswerTerms, prompt_token_ids: TokenIds) -> str | None:
        """The grammar of a planned row's answer; None if any text is allowed.

        Args:
            options: the row's `options` column, from which `terms` were compiled.
        """
        key = (options, self.encoder.starts_in_reasoning(prompt_token_ids))
        if key not in self._texts:
            self._num_characters += len(options or "")
            if len(self._texts) >= MAX_COMPILED or self._num_characters > MAX_COMPILED_CHARACTERS:
                self._texts.clear()
                self._num_characters = 0
            try:
                built = self.build(terms, starts_in_reasoning=key[1])
            except InvalidGrammar:
                # No value satisfies the schema, or it takes too much; validation says so, row by row.
                built = None
            self._texts[key] = built and built.text
        return self._texts[key]

    def build(self, terms: AnswerTerms, *, starts_in_reasoning: bool) -> BuiltGrammar | None:
        """Build a grammar; the result names the terms that it cannot enforce.

        Raises:
            InvalidGrammar: no value keeps the schema, or it takes too much to make a grammar of it.
        """
        call_format = self.encoder.encoding.call_format
        return make_answer_grammar(
            terms.options,
            schema=None if terms.schema is None else terms.schema.document,
            call_format=call_format.name if call_format is not None else None,
            starts_in_reasoning=starts_in_reasoning,
            token_id=self.encoder.token_id,
            formats="assert" if terms.schema is None else terms.schema.formats,
        )
