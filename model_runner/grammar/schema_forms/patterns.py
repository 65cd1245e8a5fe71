"""Translates regular expressions for llguidance 1.9.1 so that they mean what they mean to validation.

Part of `moebeam.model_runner.grammar.schema_forms`. Validation is jsonschema-rs 0.60 with formats asserted; what is
said here of either was measured on both.
"""

import re
from functools import lru_cache

from jsonschema_rs import validator_for
from llguidance import LLMatcher, LLTokenizer

CONTROLS = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f"
"""Characters that a JSON text must escape by number, which our grammars leave out of strings, and DEL, which
llguidance lets no string hold. Classes that begin `[^` leave them out in so many words: llguidance writes the
complement of a quotation mark as if it held the mark, unless the class has no such character."""

_SPACES = r"\t\n\x0b\x0c\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
"""ECMA-262's white space, as jsonschema-rs takes `\\s`; llguidance would add U+0085 and leave out U+FEFF."""


_CONTROL_RANGE = re.compile(r"\\x[01][0-9a-fA-F]-(?=\\[xu]|[ -~])|\\u00[01][0-9a-fA-F]-(?=\\[xu]|[ -~])")
_NEGATED_CLASS = re.compile(r"\[\^(?:\\.|[^\]\\])*\]")
_CONTROL = re.compile(r"\\x[01][0-9a-fA-F]|\\u00[01][0-9a-fA-F]|\\c|\\0|\\v|[\x00-\x08\x0b\x0c\x0e-\x1f]")


class UnsupportedPattern(ValueError):
    """A regular expression that llguidance cannot enforce; the message says why."""


@lru_cache(maxsize=1024)
def translate(pattern: str) -> tuple[str, ...]:
    """Expressions that a text matches, all of them, exactly if it matches the schema's one.

    Look-ahead at the very beginning, as rules for passwords have it, becomes an expression of its own.

    Raises:
        UnsupportedPattern: look-around elsewhere, back references, word boundaries, or more than llguidance can hold.
    """
    if _CONTROL.search(_NEGATED_CLASS.sub("", _CONTROL_RANGE.sub(r"\\t\\n\\r\\x20-", pattern))):
        raise UnsupportedPattern("it asks for control characters")
    conjuncts = tuple(
        _rewrite(_CONTROL_RANGE.sub(r"\\t\\n\\r\\x20-", conjunct)) for conjunct in _split_look_ahead(pattern)
    )
    for conjunct in conjuncts:
        reason = _find_refusal(conjunct)
        if reason is not None:
            raise UnsupportedPattern(reason)
    return conjuncts


@lru_cache(maxsize=1024)
def are_disjoint(first: str, second: str) -> bool:
    """Whether llguidance can tell that no property's name matches both of two translated expressions."""
    grammar = LLMatcher.grammar_from_json_schema(
        {"type": "object", "patternProperties": {first: {}, second: {}}, "additionalProperties": False}
    )
    return not LLMatcher.validate_grammar_with_warnings(grammar)[0]


@lru_cache(maxsize=1)
def byte_tokenizer() -> LLTokenizer:
    """A tokenizer of single bytes: enough to see whether a grammar compiles."""
    return LLTokenizer("byte")


def _find_refusal(pattern: str) -> str | None:
    try:
        grammar = LLMatcher.grammar_from_json_schema({"type": "string", "pattern": pattern})
    except ValueError as error:
        return str(error)
    matcher = LLMatcher(byte_tokenizer(), grammar, log_level=0)
    return matcher.get_error().splitlines()[-1] if matcher.is_error() else None


def _split_look_ahead(pattern: str) -> list[str]:
    r"""`^(?=.*\d)(?=.*[a-z]).{8,}$` as three expressions that begin at the beginning."""
    rest = pattern.removeprefix("^")
    if rest == pattern or not rest.startswith("(?="):
        return [pattern]
    conjuncts: list[str] = []
    while rest.startswith("(?="):
        end = _find_group_end(rest)
        if end is None:
            return [pattern]
        conjuncts.append(f"^(?:{rest[3:end]})")
        rest = rest[end + 1 :]
    if _has_alternative(rest):
        return [pattern]
    return [*conjuncts, f"^{rest}"]


def _find_group_end(text: str) -> int | None:
    """The position of the parenthesis that closes the one at the start."""
    depth = 0
    for found in re.finditer(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[()]", text, re.DOTALL):
        depth += {"(": 1, ")": -1}.get(found.group(), 0)
        if depth == 0:
            return found.start()
    return None


def _has_alternative(text: str) -> bool:
    """Whether a text has `|` outside of groups and classes."""
    depth = 0
    for found in re.finditer(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[()|]", text, re.DOTALL):
        token = found.group()
        depth += {"(": 1, ")": -1}.get(token, 0)
        if token == "|" and depth == 0:
            return True
    return False


def _rewrite(pattern: str) -> str:
    r"""The expression with `\s`, `\c` and classes as Rust's syntax needs them."""
    pieces: list[str] = []
    position = 0
    in_class = False
    is_negated = False
    while position < len(pattern):
        char = pattern[position]
        if char == "\\" and position + 1 < len(pattern):
            length = 3 if pattern[position + 1] == "c" else 2
            pieces.append(_escape(pattern[position : position + length], in_class))
            position += length
            continue
        position += 1
        if not in_class:
            if char == "[":
                in_class = True
                is_negated = pattern[position : position + 1] == "^"
                position += is_negated
                pieces.append(f"[^{CONTROLS}" if is_negated else "[")
                if pattern[position : position + 1] == "]":
                    pieces.append(r"\]")
                    position += 1
            else:
                pieces.append(char)
        elif char == "]":
            in_class = False
            pieces.append(char)
        elif char in "[&~" or (char == "-" and pattern[position : position + 1] == "-"):
            # Rust nests classes and subtracts them; ECMA-262 takes these for themselves.
            pieces.append("\\" + char)
        elif char < " " or (ord(char) > 0x7E and not char.isprintable()):
            pieces.append(f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{{{ord(char):x}}}")
        else:
            pieces.append(char)
    return "".join(pieces)


def _escape(escape: str, in_class: bool) -> str:
    match escape[1]:
        case "s":
            return _SPACES if in_class else f"[{_SPACES}]"
        case "S":
            return f"[^{_SPACES}{CONTROLS}]"
        case "c":
            return f"\\x{ord(escape[2:]) % 32:02x}" if len(escape) == 3 else escape
        case _:
            return escape


_PROBES = ("\x00 bad~", "", "%%", "::", "/~", "{", "(")
"""Of every format that jsonschema-rs asserts, at least one of these is no instance."""


@lru_cache(maxsize=1024)
def is_asserted(name: str, draft_uri: str) -> bool:
    """Whether validation under a draft refuses texts that are not of a format."""
    validator = validator_for({"$schema": draft_uri, "format": name}, validate_formats=True)
    return not all(validator.is_valid(probe) for probe in _PROBES)
