"""Marks special tokens that data spells, so that no tokenizer takes a user's text for the model's own markup.

A prompt is wire format with data in it. The tokenizer cannot tell them apart: a user who writes `<｜Assistant｜>` would
open the model's turn. While the prompt is rendered, every place of the data that spells an added token of the tokenizer
gets a noncharacter (`MARK`) after its first character; `PromptEncoder.encode_batch` finds the marks, and encodes what
stands around them by a tokenizer that knows no added tokens. Prompts of ordinary data hold no mark at all.

Data may hold the noncharacter itself. One more is put behind the first character of a token, however many stand there,
and `plain` takes exactly one away, so that every text comes back as it was.
"""

# ruff: noqa: RUF002 - the bars of the wire format are U+FF5C

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TypeAlias

from moebeam.schemas.canonical import Json

MARK = "\ufdd0"
"""Unicode reserves it for the inside of programs: no text that is meant to be exchanged holds it."""

_Trie: TypeAlias = dict[str, "_Trie"]


class TokenMarks:
    """One tokenizer's added tokens, which data must not spell; immutable.

    Tokens of one character and of white space alone are left out: there is nothing to forge with them, and models were
    trained with them in their text.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.texts = frozenset(text for text in texts if len(text) > 1 and not text.isspace() and MARK not in text)
        self._patterns: dict[frozenset[str], re.Pattern[str] | None] = {}
        self._genuine = re.compile(_match_longest(_build_trie(self.texts)))

    def has_token_text(self, text: str) -> bool:
        """Whether a text contains an added token's text, marked or not."""
        pattern = self._pattern(frozenset())
        return pattern is not None and pattern.search(text) is not None

    def mark(self, text: str, *, but: Collection[str] = ()) -> str:
        """Marks the tokens in a text of the data, except those in `but`."""
        pattern = self._pattern(frozenset(but) & self.texts)
        return text if pattern is None else pattern.sub(r"\g<0>" + MARK, text)

    def mark_json(self, value: Json, *, but: Collection[str] = ()) -> Json:
        """Marks the tokens in a JSON value's strings and keys; returns a new value where anything changes."""
        match value:
            case str():
                return self.mark(value, but=but)
            case Mapping():
                return {self.mark(key, but=but): self.mark_json(item, but=but) for key, item in value.items()}
            case Sequence():
                return [self.mark_json(item, but=but) for item in value]
            case _:
                return value

    def plain(self, text: str) -> str:
        """Removes the marks from a text or a prompt."""
        return _remove_positions(text, self._find_marks(text))

    def sections(self, prompt: str) -> Iterator[tuple[str, bool]]:
        """Splits a prompt at its genuine tokens and removes the marks; yields each piece and whether it is data.

        A piece with marks reaches from one genuine token to the next: that is what a tokenizer encodes as one. The
        pieces join to `plain(prompt)`.
        """
        marks = self._find_marks(prompt)
        borders = [(found.start(), found.end()) for found in self._genuine.finditer(prompt)] if marks else []
        given = last = at = 0  # characters given out; end of the last token; marks passed
        for begin, end in [*borders, (len(prompt), len(prompt))]:
            first = at
            while at < len(marks) and marks[at] < begin:
                at += 1
            if at > first:
                if given < last:
                    yield prompt[given:last], False
                yield _remove_positions(prompt[last:begin], [mark - last for mark in marks[first:at]]), True
                given = begin
            last = end
        if given < len(prompt):
            yield prompt[given:], False

    def _find_marks(self, prompt: str) -> list[int]:
        """The positions of the marks that `mark` put into a prompt."""
        pattern = self._pattern(frozenset()) if MARK in prompt else None
        return (
            [] if pattern is None else [found.end() - 1 for found in pattern.finditer(prompt) if found[0][-1] == MARK]
        )

    def _pattern(self, but: frozenset[str]) -> re.Pattern[str] | None:
        if but not in self._patterns:
            # What a caller wants unmarked is still given a mark where one stands already, which `plain` takes away.
            sources = [_match_first_characters(self.texts - but, "*"), _match_first_characters(but, "+")]
            self._patterns[but] = re.compile("|".join(filter(None, sources))) if self.texts else None
        return self._patterns[but]


def _remove_positions(text: str, positions: Sequence[int]) -> str:
    borders = [-1, *positions, len(text)]
    return "".join(text[before + 1 : after] for before, after in pairwise(borders))


@lru_cache(maxsize=32)
def _match_first_characters(texts: frozenset[str], num_marks: str) -> str:
    """Finds the first character of every token and the marks behind it, whatever marks stand further inside."""
    return "|".join(
        f"{re.escape(first)}{MARK}{num_marks}(?={_match_rest(rest)})"
        for first, rest in sorted(_build_trie(texts).items())
    )


def _match_rest(trie: _Trie) -> str:
    if "" in trie:  # a shorter token ends here: that one is spelled, whatever follows
        return ""
    rests = [(re.escape(character), _match_rest(rest)) for character, rest in sorted(trie.items())]
    return _join_alternatives([character + (f"{MARK}*{rest}" if rest else "") for character, rest in rests])


def _match_longest(trie: _Trie) -> str:
    """Matches the longest token, as tokenizers do."""
    longer = [re.escape(character) + _match_longest(rest) for character, rest in sorted(trie.items()) if character]
    return f"(?:{_join_alternatives(longer)})?" if longer and "" in trie else _join_alternatives(longer)


def _build_trie(texts: frozenset[str]) -> _Trie:
    """Tokens by their characters, `""` where one ends: a tokenizer has a thousand that begin alike, and every `<` of a
    text is tried."""
    trie: _Trie = {}
    for text in texts:
        node = trie
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}
    return trie


def _join_alternatives(sources: list[str]) -> str:
    return sources[0] if len(sources) == 1 else f"(?:{'|'.join(sources)})" if sources else ""


NO_MARKS = TokenMarks()
"""For encodings without a tokenizer."""
