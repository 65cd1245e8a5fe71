"""Tags of DSML, exact or nearly so: other bars, other case, white space, names and quotes that models write for them.

`dsml_repair.py` reads malformed calls by them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

from moebeam.model_runner.encoding.chat.strict_arguments import parse_value
from moebeam.schemas.errors import NotJson

Kind: TypeAlias = Literal["block", "invoke", "parameter", "other"]

_BARS = "[|\uff5c\u00a6\u2502\u2758]*"  # the bar of the format is U+FF5C; models also write look-alikes
_VALUE = r'(?:\\"[^"\\]{0,4096}\\"|"(?:[^"\\]|\\.){0,4096}"|\'[^\']{0,4096}\'|[^\s"\'<>=/]{1,256})'
_ATTRIBUTE = re.compile(rf"\s+([\w-]+)\s*+=\s*+({_VALUE})", re.DOTALL)
TAG = re.compile(
    rf"<\s*+(?P<end>/?)\s*+{_BARS}\s*+DSML\s*+{_BARS}\s*+(?P<late_end>/?)\s*+(?P<name>[A-Za-z]+(?:[ _-]?[A-Za-z]+)??)"
    rf"(?P<attributes>(?:\s+[\w-]+\s*+=\s*+{_VALUE})*)\s*+(?P<empty>/?)\s*+(?:>|(?=\s*<))",
    re.DOTALL | re.IGNORECASE,
)
_EXACT_ATTRIBUTES = re.compile(r' name="(?:[^"\\]|\\.)*"(?: string="[^"]*")?>', re.DOTALL)
ESCAPED_TAG = re.compile(r"&lt;\s*+/?\s*+[|\uff5c]+\s*+DSML", re.IGNORECASE)
_BLOCK_NAME = re.compile(r"(?:tools?|functions?)?(?:calls?|invocations?)")
LOOSE_PARAMETER_END = re.compile(rf"</\s*+{_BARS}\s*+(?:DSML)?\s*+{_BARS}\s*+parameter\s*+>\s*+\Z", re.IGNORECASE)
CUT_END = re.compile(rf"\s*+<\s*+/\s*+{_BARS}\s*+(?:D|DS|DSM|DSML)?\s*+{_BARS}\s*+[A-Za-z_ -]*", re.IGNORECASE)
CUT_BEGIN = re.compile(rf"<\s*+{_BARS}\s*+(?:D|DS|DSM|DSML{_BARS}[\w\s=\"-]*)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Tag:
    """A tag, exact or nearly so.

    Attributes:
        kind: `block` for the tags around all calls; an `other` tag is none of the format's.
        is_genuine: written with the tokenizer's own token, whatever else is wrong with it.
    """

    kind: Kind
    is_end: bool
    is_empty: bool
    attributes: Mapping[str, str]
    begin: int
    end: int
    is_genuine: bool
    is_exact: bool


def find_loose_tag(text: str, start: int) -> int:
    """Where the first tag stands that may be meant as one of DSML; -1 if none does."""
    begins = [found.start() for pattern in (TAG, ESCAPED_TAG) if (found := pattern.search(text, start))]
    return min(begins, default=-1)


def list_tags(text: str, start: int, exact_tags: frozenset[str]) -> list[Tag]:
    """The tags of a text from a character on.

    Args:
        exact_tags: the tags as they should be; those with attributes up to the first.
    """
    return [_read_tag(found, exact_tags) for found in TAG.finditer(text, start)]


def _read_tag(found: re.Match[str], exact_tags: frozenset[str]) -> Tag:
    name = re.sub(r"[^a-z]", "", found["name"].lower())
    kind: Kind = "other"
    if name == "invoke":
        kind = "invoke"
    elif name in ("parameter", "parameters", "param"):
        kind = "parameter"
    elif _BLOCK_NAME.fullmatch(name):
        kind = "block"
    attributes = {key.lower(): _read_attribute(value) for key, value in _ATTRIBUTE.findall(found["attributes"])}
    if kind == "invoke" and "name" in attributes:
        attributes["name"] = attributes["name"].strip()
    is_end = bool(found["end"] or found["late_end"])
    written = found[0]
    is_exact = written in exact_tags or any(
        written.startswith(f"{tag} ") and _EXACT_ATTRIBUTES.fullmatch(written, len(tag)) for tag in exact_tags
    )
    is_empty = bool(found["empty"]) and not is_end
    is_genuine = "\uff5cDSML\uff5c" in written
    return Tag(kind, is_end, is_empty, attributes, found.start(), found.end(), is_genuine, is_exact)


def _read_attribute(written: str) -> str:
    if written.startswith('\\"'):
        return written[2:-2]
    if written.startswith("'"):
        return written[1:-1]
    if not written.startswith('"'):
        return written
    try:
        return cast("str", parse_value(written)) if "\\" in written else written[1:-1]
    except NotJson:
        return written[1:-1]
