"""What models put around an answer though nobody asked for it: a `<think>` block before it, a Markdown fence around it.

Used by `transforms/answer/validate.py` where the job asks for JSON or for reasoning. Text that is cut from an answer is
never lost: a think block becomes its reasoning, and a fenced answer keeps its text as the provider sent it.
"""

import re

_THINK, _END_THINK = "<think>", "</think>"
_FENCE = re.compile(r"\s*```[ \t]*[\w+.-]*[ \t]*(?:\r?\n|(?=[\[{\"]))(?P<inside>.*?)(?:```\s*)?", re.DOTALL)
"""The closing line may be missing, as where it is a stop string."""


def split_think(text: str, *, is_cut: bool = False) -> tuple[str, str] | None:
    """The think block at a text's beginning and what follows it, both stripped of the white space between them.

    Args:
        is_cut: whether `max_tokens` ended the text, so that a block without its end is all of it.
    Returns:
        None if the text does not begin with a block, or does not end it.
    """
    begun = text.lstrip()
    if not begun.startswith(_THINK):
        return None
    inside, end, rest = begun.removeprefix(_THINK).partition(_END_THINK)
    if not end and not is_cut:
        return None
    return inside.strip(), rest.lstrip()


def strip_fence(text: str) -> str:
    """What stands inside of a Markdown fence around the whole text, with or without a language; else the text."""
    found = _FENCE.fullmatch(text)
    return text if found is None else found["inside"]
