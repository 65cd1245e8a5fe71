"""Generates the job file's reference: `python -m moebeam.jobs.check.job_file_guide > docs/job-file.md`."""

import json
from collections.abc import Iterator
from typing import Any, cast

from moebeam.schemas.job.model import ENGINE_OPTIONS, ModelSection, load_options
from moebeam.schemas.job.section import Section
from moebeam.schemas.job.sections import Job

_INTRODUCTION = """\
# The job file

A job file is TOML. Unknown keys are refused with the nearest known name. Every key can be overridden on the command
line: `moebeam run job.toml --set sampling.max_tokens=64`. Paths in the file are relative to the file, paths in `--set`
to the working directory; URLs such as `s3://bucket/folder` stay as they are (`pip install moebeam[s3]`,
or `moebeam[gcp]` for `gs://`).
"""


def job_file_guide() -> str:
    """Render the whole page in Markdown."""
    pages = [_INTRODUCTION]
    for name, field in Job.model_fields.items():
        section = cast("type[Section]", field.annotation)
        pages.append(_table(f"## `[{name}]`", section))
        if section is ModelSection:
            pages += _engine_tables()
    return "\n".join(pages)


def _engine_tables() -> Iterator[str]:
    """Render the options that each engine has beyond the common ones."""
    for engine in ENGINE_OPTIONS:
        options = load_options(engine)
        summary = cast("str", options.__doc__).strip().partition(": ")[2]
        yield _table(
            f'### `[model]` with `engine = "{engine}"`\n\n{summary[0].upper()}{summary[1:]}',
            options,
            leave_out=ModelSection,
        )


def _table(title: str, section: type[Section], leave_out: type[Section] | None = None) -> str:
    schema: dict[str, Any] = section.model_json_schema(by_alias=True)
    required = set(schema.get("required", ()))
    inherited = leave_out.model_fields if leave_out is not None else {}
    own = {name: field for name, field in schema["properties"].items() if name not in inherited}
    rows = [_row(name, field, name in required) for name, field in own.items()]
    return "\n".join([title, "", "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _row(name: str, field: dict[str, Any], is_required: bool) -> str:
    default = "required" if is_required else f"`{json.dumps(field.get('default'))}`"
    return f"| `{name}` | {_format_type(field)} | {default} | {field.get('description', '')} |"


def _format_type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_format_type(option) for option in field["anyOf"] if option.get("type") != "null")
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
