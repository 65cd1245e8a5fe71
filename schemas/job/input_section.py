"""`[input]` of a job file: which rows are read, and which of their columns come back with the answers."""

from typing import Annotated, Literal, cast

from pydantic import BeforeValidator, Field, PlainSerializer, PrivateAttr, WithJsonSchema, model_validator

from moebeam.schemas.job.section import Section
from moebeam.schemas.lakehouse.table_url import DELTA, ICEBERG


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

    path: _Path | Annotated[tuple[_Path, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="A file, a folder, a glob (`{a,b}` too), an object-store URL or a finished run's output; or "
        "several. Or a table: `iceberg://CATALOG/NAMESPACE.TABLE`, `delta://FOLDER`",
    )
    query: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="Instead of `path`: a SELECT statement in DuckDB's SQL over files that it names in single quotes",
    )
    format: Literal["auto", "parquet", "csv", "jsonl", "arrow"] = Field(
        default="auto",
        description="`auto` goes by the suffix; lines of `jsonl` are rows, or requests in the OpenAI batch shape",
    )
    types: dict[str, str] = Field(
        default_factory=dict,
        description='Types of columns of CSV files, such as `{ zip = "string", price = "decimal128(9, 2)" }`; others '
        "are found from the values",
    )
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = Field(
        default=None,
        description="Between the fields of CSV files; default the one of `,`, `;`, tab and `|` in the header",
    )
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
    tenant: str = Field(default="", description="Tenant of rows that name none, so of all lines of a batch file")
    cost_center: str = Field(default="", description="Cost centre of rows that name none")

    _folder: str | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check_one_source(self) -> "InputSection":
        if (self.path is None) == (self.query is None):
            raise ValueError(f"expected `path` or `query`, found {'both' if self.path is not None else 'neither'}")
        if len(self.paths) > 1 and any(map(is_table_url, self.paths)):
            raise ValueError("path: expected a table alone, found it among other paths; read them by runs of their own")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths, also where there is one; none of a query."""
        return (self.path,) if isinstance(self.path, str) else self.path or ()

    @property
    def shown_path(self) -> str:
        """The paths as messages name them."""
        return ", ".join(map(repr, self.paths)) or "of the query"

    @property
    def is_staged(self) -> bool:
        """Whether rows are made by executing something, and kept by the run."""
        return self.query is not None or any(map(is_table_url, self.paths))

    @property
    def folder(self) -> str | None:
        """Where the job file lies, to which the files of a query are relative; None for the working directory."""
        return self._folder

    def in_folder(self, folder: str) -> "InputSection":
        """The same section, of a job file in `folder`."""
        section = self.model_copy()
        section._folder = folder
        return section


def is_table_url(path: str) -> bool:
    """Whether a path is a table of a lakehouse, see `moebeam.schemas.lakehouse.table_url`."""
    return path.startswith((ICEBERG, DELTA))
