"""In what two jobs differ that may have changed their answers."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moebeam.jobs.output.run_record import RunRecord
from moebeam.schemas.canonical import Json

_NO_MATTER = ("output.path", "output.max_reject_share", "limits.", "failures.", "accounting.", "value_chain.")
"""Keys, and beginnings of keys, that shape no answer."""

_MAX_SHOWN = 160
_MODEL = ("engine", "name", "revision")


@dataclass(frozen=True, slots=True)
class JobDifference:
    """A key of the job file, or a fact about what it named, in both runs; as text, shortened."""

    name: str
    a: str
    b: str


def find_job_differences(
    a: RunRecord, b: RunRecord, manifest_a: Mapping[str, Any], manifest_b: Mapping[str, Any]
) -> list[JobDifference]:
    """What differs between the jobs of two runs: the model as it was found, keys, and the contents of files.

    Returns:
        The model first, then keys in the order of the job file. A part whose digests differ though none of its keys do,
        such as a schema whose file was changed, comes last.
    """
    found = [
        JobDifference(f"model {name}", str(one), str(other))
        for name in _MODEL
        if (one := manifest_a["model"].get(name)) != (other := manifest_b["model"].get(name))
    ]
    keys_a, keys_b = (dict(_flatten(record.request.job.model_dump(mode="json", by_alias=True))) for record in (a, b))
    for key in [*keys_a, *(key for key in keys_b if key not in keys_a)]:
        one, other = keys_a.get(key, "not set"), keys_b.get(key, "not set")
        if one != other and not key.startswith(_NO_MATTER):
            found.append(JobDifference(key, _shorten(one), _shorten(other)))
    sections = {difference.name.partition(".")[0] for difference in found}
    for part in sorted({*a.parts, *b.parts}):
        one, other = a.parts.get(part), b.parts.get(part)
        is_told = any(f"[{section}]" in part for section in sections) or (part == "[model]" and found)
        if one != other and part != "[accounting]" and not is_told:
            found.append(JobDifference(part, _digest(one), _digest(other)))
    return found


def _flatten(value: Json, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flatten(inner, f"{key}.{name}" if key else name)
    else:
        yield key, "not set" if value is None else value if isinstance(value, str) else json.dumps(value)


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _digest(digest: str | None) -> str:
    return "none" if digest is None else f"digest {digest[:12]}"
