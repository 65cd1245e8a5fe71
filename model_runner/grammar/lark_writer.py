"""Writes a grammar in llguidance's Lark, rule by rule, for `moebeam.model_runner.grammar.answer_grammar`.

Markup that is one token of the tokenizer is written as that token's number: llguidance lets text spell no such token,
and no token spell such text. Everything else is written as text.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping

from moebeam.model_runner.grammar.json_grammar import inline_schema
from moebeam.schemas.canonical import Json


class LarkWriter:
    """Rules and terminals in the order in which they are added; the first is not yet the start."""

    def __init__(self, token_id: Callable[[str], int | None], markup: Iterable[str]) -> None:
        """Begin a grammar.

        Args:
            token_id: the id of the token with a text, or None.
            markup: texts that may be tokens.
        """
        found = {text: token_id(text) for text in sorted(markup, key=lambda text: (-len(text), text))}
        self._ids = {text: number for text, number in found.items() if number is not None}
        self._split = re.compile("|".join(f"({re.escape(text)})" for text in self._ids)) if self._ids else None
        self._lines: dict[str, str] = {}

    def rule(self, name: str, body: str, *, options: str = "") -> str:
        """Add a rule, whose name begins in lower case; returns the name."""
        assert self._lines.setdefault(name, f"{name}{options}: {body}") == f"{name}{options}: {body}", name
        return name

    def terminal(self, name: str, expression: str) -> str:
        """Add a terminal, whose name is in upper case; returns the name."""
        return self.rule(name, expression)

    def is_token(self, text: str) -> bool:
        """Whether a text of the markup is one token."""
        return text in self._ids

    def text_without(self, name: str, excluded: str, *, max_characters: int | None = None) -> str:
        """A terminal of any text that does not hold another."""
        pattern = re.escape(excluded).replace("/", r"\/").replace("\n", "n")
        count = "*" if max_characters is None else f"{{0,{max_characters}}}"
        return self.terminal(name, rf"/(?s:.{count})/ & ~/(?s:.*){pattern}(?s:.*)/")

    def literal(self, text: str) -> str:
        """The expression for a fixed text."""
        return " ".join(map(_format_part, self._parts(text)))

    def until(self, name: str, text_terminal: str, end: str) -> str:
        """Any text of a terminal up to and with a fixed one, which must hold what the terminal excludes."""
        first, *rest = self._parts(end)
        if isinstance(first, int):
            return self.rule(name, " ".join([text_terminal, _format_part(first), *map(_format_part, rest)]))
        if not rest:
            return self.rule(name, f"{text_terminal} {_format_part(first)}", options="[lazy]")
        # A token ends the terminal wherever it can end.
        before = self.terminal(f"{name.upper()}_BEGIN", f"{text_terminal} {_format_part(first)}")
        return self.rule(name, " ".join([before, *map(_format_part, rest)]))

    def json(self, document: Mapping[str, Json]) -> str:
        """A JSON text that is valid for a schema."""
        return f"%json {inline_schema(document)}"

    def write(self, start: str) -> str:
        """The grammar as JSON, as `Request.grammar` takes it."""
        lark = "\n".join([f"start: {start}", *self._lines.values(), ""])
        return json.dumps({"grammars": [{"lark_grammar": lark}]}, ensure_ascii=False)

    def _parts(self, text: str) -> list[str | int]:
        pieces = [text] if self._split is None else [piece for piece in self._split.split(text) if piece]
        return [self._ids.get(piece, piece) for piece in pieces]


def _format_part(part: str | int) -> str:
    return f"<[{part}]>" if isinstance(part, int) else json.dumps(part, ensure_ascii=False)
