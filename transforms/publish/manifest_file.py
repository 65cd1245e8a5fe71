"""The file `manifest.json`: whole, and with its own digest as the last key."""

import json
from collections.abc import Mapping
from typing import Any

from moebeam.schemas.canonical import Json
from moebeam.schemas.store import storage
from moebeam.schemas.store.damage import describe_damage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.store.sealed_json import seal_json, unseal_json


def format_manifest(manifest: dict[str, Json]) -> str:
    """The text of the file."""
    return seal_json(json.dumps(manifest, indent=2, ensure_ascii=False).encode()).decode()


def read_manifest_file(layout: RunLayout) -> dict[str, Any] | None:
    """The manifest, complete or not; None if there is none.

    Raises:
        FileDamaged: it is not what was written.
        OSError: the store failed.
    """
    try:
        content = storage.read_bytes(layout.manifest)
    except FileNotFoundError:
        return None
    try:
        found: object = json.loads(unseal_json(content))
    except ValueError as error:
        raise describe_damage(layout.manifest, str(error)) from error
    if isinstance(found, dict) and found.get("status") in ("complete", "incomplete"):
        return found
    raise describe_damage(layout.manifest, "expected the manifest of a run, found other content")


def count_answers(manifest: Mapping[str, Any]) -> int:
    """Answers that the rows of a run were planned to have; one each in manifests of older versions."""
    return manifest.get("answers_in", manifest["rows_in"])
