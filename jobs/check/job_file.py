"""Reads job files: TOML and `--set` overrides become a checked `Job` with absolute paths.

`jobs/check/preflight.py` then checks the job against the files it names, and `jobs/run/launch.py` runs it. All problems
of a job file are reported at once, each with section and key.
"""

import datetime
import difflib
import json
import os
import posixpath
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from moebeam.jobs.check.job_problems import MAX_SHOWN_CHARS, Draft, KeyPath, explain_errors, join_problems
from moebeam.jobs.prices.shipped import BUILTIN
from moebeam.schemas.errors import JobFileError
from moebeam.schemas.job.model import model_keys
from moebeam.schemas.job.sections import Job
from moebeam.schemas.lakehouse.table_url import DELTA
from moebeam.schemas.store import storage

_PATH_KEYS = {
    ("input", "path"),
    ("output", "path"),
    ("output", "table"),
    ("output", "schema"),
    ("model", "path"),
    ("model", "script"),
    ("accounting", "price_book"),
    ("tools", "path"),
}
_CLASS_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_TOML_PLACE = re.compile(r" \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)$")


def load_job(path: str, overrides: Sequence[str] = ()) -> Job:
    """Read a job file and apply overrides.

    Args:
        path: a local path or an object-store URL. Relative paths in the file are relative to its folder.
        overrides: `section.key=value`, with a TOML value or plain text. Relative paths here are relative to the
            working directory.
    Raises:
        JobFileError: all problems, one per line.
    """
    return make_job(read_sections(path), path.rsplit("/", 1)[-1], find_folder(path), overrides)


def make_job(sections: Mapping[str, Any], name: str, folder: str, overrides: Sequence[str] = ()) -> Job:
    """Check a job's sections and apply overrides.

    Args:
        sections: as TOML reads them.
        name: of the job, for messages.
        folder: relative paths are relative to it.
    Raises:
        JobFileError: all problems, one per line.
    """
    draft = Draft(name, {key: dict(table) if isinstance(table, Mapping) else table for key, table in sections.items()})
    _resolve_paths(draft.values, folder)
    _apply_overrides(draft, overrides)
    _drop_unknown_keys(draft)
    _check_empty_paths(draft)
    job = _validate(draft)
    if draft.problems or job is None:
        raise JobFileError(join_problems(draft.problems))
    return job.in_folder(folder)


def read_job(values: Mapping[str, Any], name: str = "the job") -> Job:
    """Validate a job given as sections; paths are relative to the working directory.

    Raises:
        JobFileError: all problems, one per line.
    """
    try:
        return Job.model_validate(values)
    except ValidationError as error:
        draft = Draft(name, dict(values))
        explain_errors(draft, error, skip=set())
        raise JobFileError(join_problems(draft.problems)) from error


def override_job(job: Job, overrides: Sequence[str], refusal: Callable[[KeyPath], str | None]) -> Job:
    """Apply `--set` to an already loaded job, for the keys that may still change.

    Args:
        overrides: as in `load_job`.
        refusal: why a section and key may not be set; None if it may.
    Raises:
        JobFileError: all problems, one per line.
    """
    if not overrides:
        return job
    draft = Draft(name="the kept job", values=job.model_dump(mode="json", by_alias=True))
    _apply_overrides(draft, overrides)
    known = _list_keys()
    for place in draft.set_texts:
        is_known = place[0] in known and (len(place) == 1 or place[1] in known[place[0]])
        if is_known and (reason := refusal(place)) is not None:
            draft.refuse(place, reason)
    _drop_unknown_keys(draft)
    changed = _validate(draft)
    if draft.problems or changed is None:
        raise JobFileError(join_problems(draft.problems))
    return changed if job.folder is None else changed.in_folder(job.folder)


def read_sections(path: str) -> dict[str, Any]:
    """Read a job file as it is written, unchecked.

    Raises:
        JobFileError: the file cannot be read or is not TOML.
    """
    content = _read(path)
    try:
        # Windows editors write a byte order mark, which is not valid TOML.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise JobFileError(
            f"{path}, line {line}: a job file is UTF-8; found byte 0x{content[error.start]:02x}"
        ) from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise JobFileError(_explain_toml_error(path, text, str(error))) from error
    except RecursionError as error:
        raise JobFileError(f"{path}: arrays or tables are nested too deeply") from error


def _read(path: str) -> bytes:
    if storage.is_local(path):
        try:
            return storage.read_bytes(os.path.expanduser(path))
        except FileNotFoundError as error:
            raise JobFileError(f"{path}: there is no such job file") from error
        except IsADirectoryError as error:
            raise JobFileError(f"{path}: is a folder; name the job file in it") from error
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise JobFileError(f"{path}: cannot be read: {reason}") from error
    try:
        return storage.read_bytes(path)
    except FileNotFoundError as error:
        raise JobFileError(f"{path}: there is no such job file") from error
    except Exception as error:  # each store has its own error tree, without a common base class
        raise JobFileError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error


def _explain_toml_error(path: str, text: str, message: str) -> str:
    place = _TOML_PLACE.search(message)
    if place is None:
        return f"{path}: not TOML: {message}"
    reason = message[: place.start()]
    if place["line"] is None:
        return f"{path}, at its end: not TOML: {reason}"
    lines = text.splitlines()
    number = int(place["line"])
    shown = f"\n    {lines[number - 1].strip()[:MAX_SHOWN_CHARS]}" if number <= len(lines) else ""
    return f"{path}, line {number}, column {place['column']}: not TOML: {reason}{shown}"


def find_folder(path: str) -> str:
    """The folder of a job file, absolute."""
    if storage.is_local(path):
        return os.path.dirname(os.path.abspath(os.path.expanduser(path.removeprefix("file://"))))
    return path.rpartition("/")[0]


def _resolve_paths(values: Mapping[str, Any], folder: str) -> None:
    for section, key in _PATH_KEYS:
        table = values.get(section)
        if isinstance(table, dict) and table.get(key):
            table[key] = _resolve_value((section, key), table[key], folder)
    chain: Any = values.get("value_chain")
    parties: Any = chain.get("parties") if isinstance(chain, dict) else None
    for party in cast("list[Any]", parties) if isinstance(parties, list) else []:
        if isinstance(party, dict) and isinstance(party.get("price_book"), str) and party["price_book"]:
            party["price_book"] = _resolve_key(("accounting", "price_book"), party["price_book"], folder)


def _resolve_value(place: KeyPath, value: Any, folder: str) -> Any:
    """A path, or each of several; what is no path is left for the validation."""
    if isinstance(value, list):
        return [_resolve_value(place, item, folder) for item in cast("list[Any]", value)]
    return _resolve_key(place, value, folder) if isinstance(value, str) and value else value


def _resolve_key(place: KeyPath, path: str, folder: str) -> str:
    """The path that a key holds, made absolute; names that stand in the place of a path stay as they are."""
    if place == ("output", "table"):
        inner = path.removeprefix(DELTA)
        return path if inner == path or "://" in inner else f"{DELTA}{_resolve(inner, folder)}"
    is_class = place == ("output", "schema") and _CLASS_REFERENCE.fullmatch(path) is not None
    is_shipped = place == ("accounting", "price_book") and path == BUILTIN
    return path if is_class or is_shipped else _resolve(path, folder)


def _resolve(path: str, folder: str) -> str:
    if "://" in path:
        return path
    path = os.path.expanduser(path)
    if os.path.isabs(path) or "://" not in folder:
        return os.path.normpath(os.path.join(folder, path))
    protocol, _, inner = folder.partition("://")
    return f"{protocol}://{posixpath.normpath(posixpath.join(inner, path))}"


def _apply_overrides(draft: Draft, overrides: Sequence[str]) -> None:
    for override in overrides:
        if not override.isascii() and any("\ud800" <= letter <= "\udfff" for letter in override):
            draft.problems.append(f"--set {override!a}: is not UTF-8")
            continue
        key, equals, text = override.partition("=")
        place = tuple(part.strip() for part in key.split("."))
        if not equals or not all(_BARE_KEY.fullmatch(part) for part in place):
            draft.problems.append(f"--set {override}: expected section.key=value, for example sampling.max_tokens=256")
            continue
        if len(place) > 2:
            draft.problems.append(f"--set {key}: no key has keys of its own; write section.key=value")
            continue
        for leaf, value in _split_table(place, _toml_value(text.strip())):
            _set_value(draft, leaf, value, text.strip())


def _toml_value(text: str) -> Any:
    """Parse a text as a TOML value, or return it unchanged.

    It must parse both alone, which excludes a trailing comma, and in an array, which excludes comments and line breaks.
    """
    try:
        tomllib.loads(f"value = [{text}]")
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _split_table(place: KeyPath, value: Any) -> list[tuple[KeyPath, Any]]:
    if isinstance(value, dict) and len(place) == 1:
        return [((*place, key), inner) for key, inner in cast("dict[str, Any]", value).items()]
    return [(place, value)]


def _set_value(draft: Draft, place: KeyPath, value: Any, text: str) -> None:
    draft.set_texts[place] = text
    if place in _PATH_KEYS:
        value = _resolve_value(place, value, os.getcwd())
    table: Any = draft.values if len(place) == 1 else draft.values.setdefault(place[0], {})
    if isinstance(table, dict):
        table[place[-1]] = value
    else:
        draft.refuse(place, f"{draft.name} gives [{place[0]}] a single value; it must be a section")


def _drop_unknown_keys(draft: Draft) -> None:
    """Report unknown keys and remove them, so that the rest can be validated."""
    sections = _list_keys()
    for name in list(draft.values):
        if name not in sections:
            value = draft.values.pop(name)
            places = [(name,), *((name, key) for key in value)] if isinstance(value, dict) else [(name,)]
            place = next((place for place in places if place in draft.set_texts), (name,))
            draft.refuse(place, _explain_unknown_section(name, is_table=isinstance(value, dict)))
            continue
        table = draft.values[name]
        if not isinstance(table, dict):
            continue
        for key in list(cast("dict[str, Any]", table)):
            if key not in sections[name]:
                del table[key]
                draft.refuse((name, key), _explain_unknown_key(name, key))


def _list_keys() -> dict[str, list[str]]:
    """List the keys of each section, as spelled in a job file."""
    sections = {
        name: [inner.alias or key for key, inner in cast("type[BaseModel]", section.annotation).model_fields.items()]
        for name, section in Job.model_fields.items()
    }
    # Keys that the job's engine lacks are reported later, with the engines that have them.
    return {**sections, "model": model_keys()}


def _explain_unknown_section(name: str, *, is_table: bool) -> str:
    sections = _list_keys()
    homes = [section for section, keys in sections.items() if name in keys]
    if homes and not is_table:
        return f"unknown key outside a section; it belongs in {' or '.join(f'[{home}]' for home in homes)}"
    near = difflib.get_close_matches(name, sections, n=1)
    if near:
        return f"unknown section; did you mean [{near[0]}]?"
    return f"unknown section; there are {', '.join(f'[{section}]' for section in sections)}"


def _explain_unknown_key(section: str, key: str) -> str:
    sections = _list_keys()
    near = difflib.get_close_matches(key, sections[section], n=1)
    homes = [name for name, keys in sections.items() if key in keys]
    if homes and not near:
        return f"unknown key; it belongs in {' or '.join(f'[{home}]' for home in homes)}"
    if near:
        return f"unknown key; did you mean '{near[0]}'?"
    return f"unknown key; [{section}] has {', '.join(sections[section])}"


def _check_empty_paths(draft: Draft) -> None:
    """Report empty optional paths, which would silently mean the folder of the job file."""
    for section, key in sorted(_PATH_KEYS - {("input", "path"), ("output", "path")}):
        table = draft.values.get(section)
        if isinstance(table, dict) and table.get(key) == "":
            draft.refuse((section, key), "is empty; name a path or leave the key out")


def _validate(draft: Draft) -> Job | None:
    """Validate by pydantic's strict JSON rules: 512 is a number, "512" a string, true neither."""
    dates = set(_find_dates(draft.values, ()))
    for place in sorted(dates):
        draft.refuse(place, "TOML reads this as a date or time, which no key takes; put it in quotes")
    try:
        return Job.model_validate_json(json.dumps(draft.values, default=str), strict=True)
    except ValidationError as error:
        explain_errors(draft, error, skip=dates)
    return None


def _find_dates(value: Any, place: KeyPath) -> list[KeyPath]:
    """Section and key of every value that is, or holds, a date or time."""
    if isinstance(value, dict):
        inner = [(cast("KeyPath", (*place, key))[:2], held) for key, held in cast("dict[str, Any]", value).items()]
    elif isinstance(value, list):
        inner = [(place, held) for held in cast("list[Any]", value)]
    else:
        return [place] if isinstance(value, (datetime.date, datetime.time)) else []
    return [found for where, held in inner for found in _find_dates(held, where)]
