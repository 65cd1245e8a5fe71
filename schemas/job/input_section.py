"""`[input]` of a job file: which rows are read, and which of their columns come back with the answers."""

from typing import Annotated, Literal, cast

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from moebeam.schemas.job.section import Section


class PassthroughSection(Section):
    """`[input] passthrough`: input columns repeated in the output, and their names there."""

    columns: tuple[str, ...] | Literal["all"] = "all"
    rename: dict[str, str] = Field(default_factory=dict)
    prefix: str = ""

    def name_output(self, column: str) -> str:
        """The name of an input column in the output."""
        return self.rename.get(column, f"{self.prefix}{column}")


def _read_short_passthrough(value: object) -> object:
    """`all` or a list of columns stand for a table without other keys."""
    given = cast("dict[str, object]", value) if isinstance(value, dict) else {"columns": value}
    if isinstance(columns := given.get("columns"), list):
        return {**given, "columns": tuple(cast("list[object]", columns))}
    return value if isinstance(value, PassthroughSection) else given


def _write_short_passthrough(value: PassthroughSection) -> object:
    """The inverse, so that records of jobs without rename and prefix read as they always did."""
    return value.model_dump() if value.rename or value.prefix else value.columns


_PASSTHROUGH_SCHEMA = {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"const": "all"}, {"type": "table"}]}
_Path = Annotated[str, Field(min_length=1)]


class InputSection(Section):
    """`[input]`: which rows are read."""

    path: _Path | Annotated[tuple[_Path, ...], Field(min_length=1)] = Field(
        description="A file, a folder, a glob (`{a,b}` too), an object-store URL or a finished run's output; or several"
    )
    format: Literal["auto", "parquet", "jsonl"] = Field(default="auto", description="`jsonl` is the OpenAI batch shape")
    id_column: str | None = Field(
        default=None, description="Column whose values become custom_id; else derived from position"
    )
    passthrough: Annotated[
        PassthroughSection,
        BeforeValidator(_read_short_passthrough),
        PlainSerializer(_write_short_passthrough),
        WithJsonSchema(_PASSTHROUGH_SCHEMA),
    ] = Field(
        default_factory=lambda: PassthroughSection(columns=()),
        description="Input columns repeated in the output: their names, `all`, or a table such as "
        '`{ prefix = "in_", rename = { cost = "their_cost" } }`: `columns` in it is `all` unless given, `prefix` '
        "begins every name that `rename` does not change",
        json_schema_extra={"default": []},
    )
    tenant_column: str | None = Field(
        default=None, description="Rows of different tenants never share or merge anything"
    )
    cost_center_column: str | None = Field(default=None, description="Who is charged within a tenant")

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths, also where there is one."""
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def shown_path(self) -> str:
        """The paths as messages name them."""
        return ", ".join(map(repr, self.paths))
