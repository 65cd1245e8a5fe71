"""The files that a user means by a path: a file, a folder, a glob, or alternatives in braces.

A path that exists is that path, whatever its name holds. Otherwise `{a,b}` stands for either, and `*`, `?`, `[ab]` and
`**` match as in a shell. Files and folders whose names begin with a dot or an underscore are skipped, as Spark and Hive
do, unless the pattern itself writes such a name; a folder `_key=value` is a partition and is kept.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from moebeam.schemas.store import storage

_MARKS = "*?["


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file that a pattern means.

    Attributes:
        path: as `storage.list_files` writes it.
        info: fsspec's.
        root: the folder above it that the pattern names without a mark; written as `path` is.
    """

    path: str
    info: Mapping[str, Any]
    root: str


def find_files(pattern: str) -> list[FoundFile]:
    """Find the files of a pattern, sorted by path, each once; empty if there are none.

    A glob that matches folders alone means the files below them.

    Raises:
        OSError: the store cannot be listed.
    """
    has_marks = any(mark in pattern for mark in f"{_MARKS}{{")
    alternatives = [pattern] if not has_marks or storage.exists(pattern) else expand_braces(pattern)
    found = {file.path: file for alternative in alternatives for file in _find_alternative(alternative)}
    return [found[path] for path in sorted(found)]


def expand_braces(pattern: str) -> list[str]:
    """Every alternative of a pattern: `a.{x,y}` is `a.x` and `a.y`; braces without a comma stand for themselves."""
    start = pattern.find("{")
    while start >= 0:
        end, commas = _match_brace(pattern, start)
        if end is not None and commas:
            bounds = [start, *commas, end]
            options = [pattern[left + 1 : right] for left, right in pairwise(bounds)]
            tails = expand_braces(pattern[end + 1 :])
            heads = [head for option in options for head in expand_braces(option)]
            return [pattern[:start] + head + tail for head in heads for tail in tails]
        start = pattern.find("{", start + 1)
    return [pattern]


def _match_brace(pattern: str, start: int) -> tuple[int | None, list[int]]:
    """Where the brace that opens at `start` closes, if it does, and the commas between that belong to it."""
    depth = 0
    commas: list[int] = []
    for place in range(start, len(pattern)):
        character = pattern[place]
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return place, commas
        if character == "," and depth == 1:
            commas.append(place)
    return None, commas


def _find_alternative(pattern: str) -> Iterator[FoundFile]:
    root, rest = _split_root(pattern)
    glob = _escape(root) + rest if rest else root
    files = storage.list_files(glob)
    if rest and not files:
        files = storage.list_files(storage.join(glob, "**"))
    root = storage.normalize_path(root).rstrip("/")
    written = {part[:1] for part in rest.split("/")}
    for path, info in files:
        if path == root:
            yield FoundFile(path, info, path.rpartition("/")[0])
        elif not any(_is_hidden(part, written) for part in path[len(root) + 1 :].split("/")):
            yield FoundFile(path, info, root)


def _split_root(pattern: str) -> tuple[str, str]:
    """The folder that a pattern names literally, and what is left to match below it; empty for a path without marks."""
    protocol, separator, inner = pattern.rpartition("://")
    parts = inner.split("/")
    for number, part in enumerate(parts):
        if any(mark in part for mark in _MARKS):
            path = protocol + separator + "/".join(parts[: number + 1])
            # The last part may be a file, where the others are folders.
            exists = storage.exists(path) if number == len(parts) - 1 else storage.is_folder(path)
            if not exists:
                root = "".join(f"{name}/" for name in parts[:number])
                return protocol + separator + root, "/".join(parts[number:])
    return pattern, ""


def _escape(root: str) -> str:
    """A folder's path as a glob that matches nothing else."""
    return "".join(f"[{character}]" if character in _MARKS else character for character in root)


def _is_hidden(name: str, written: set[str]) -> bool:
    first = name[:1]
    return first in (".", "_") and first not in written and not (first == "_" and "=" in name)
