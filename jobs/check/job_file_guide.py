"""The job file's reference, made from the code: `python -m moebeam.jobs.check.job_file_guide > docs/job-file.md`."""

import json
from typing import Any

from moebeam.schemas.job.sections import Job

_INTRODUCTION = """\
# The job file

A job file is TOML. Unknown keys are refused with the nearest known name. Every key can be overridden on the command
line: `moebeam run job.toml --set sampling.max_tokens=64`. Paths in the file are relative to the file, paths in `--set`
to the working directory; URLs such as `s3://bucket/folder` stay as they are (`pip install moebeam[s3]`,
or `moebeam[gcp]` for `gs://`).
"""


def job_file_guide() -> str:
    """The whole page, in Markdown."""
    schema: dict[str, Any] = Job.model_json_schema(by_alias=True)
    pages = [_INTRODUCTION]
    for section in schema["properties"]:
        definition = schema["$defs"][Job.model_fields[section].annotation.__name__]  # type: ignore[union-attr]
        required = set(definition.get("required", ()))
        rows = [_row(name, field, name in required) for name, field in definition["properties"].items()]
        head = ["| key | type | default | meaning |", "|---|---|---|---|"]
        pages.append("\n".join([f"## `[{section}]`", "", *head, *rows, ""]))
    return "\n".join(pages)


def _row(name: str, field: dict[str, Any], is_required: bool) -> str:
    default = "required" if is_required else f"`{json.dumps(field.get('default'))}`"
    return f"| `{name}` | {_type_of(field)} | {default} | {field.get('description', '')} |"


def _type_of(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type_of(option) for option in field["anyOf"] if option.get("type") != "null")
    if "enum" in field:
        return ", ".join(f"`{json.dumps(value)}`" for value in field["enum"])
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if field.get("type") == "array":
        items = field.get("items", {})
        return "list of tables" if "$ref" in items else f"list of {items.get('type', 'value')}"
    return str(field.get("type", "value"))


if __name__ == "__main__":
    print(job_file_guide(), end="")
