"""Checks the table of a lakehouse to which a job's run will be committed, before anything is asked or paid.

Part of `jobs/check/preflight.py`: the format's library is installed, its catalog or store answers, and the run's
columns fit those of the three tables. The commit itself looks at all of it again.
"""

import pyarrow as pa

from moebeam.jobs.output.run_record import RunRequest
from moebeam.schemas.errors import OutputError
from moebeam.schemas.lakehouse.table_url import TableUrl, parse_table_url
from moebeam.schemas.redaction.hide import hide_in_message
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import Table
from moebeam.transforms.publish.lakehouse.commit_run import ORDER, describe_error, open_table, table_schemas
from moebeam.transforms.publish.lakehouse.stored_types import find_cut_times, fit_schemas

_TYPES = (pa.types.is_string, pa.types.is_integer, pa.types.is_date)


def check_output_table(request: RunRequest, schema: pa.Schema, run_id: str) -> tuple[str, ...]:
    """Check `[output] table`; returns warnings.

    Args:
        schema: of the run's results, as they will be published.
    Raises:
        MissingExtra: the format's library is not installed.
        OutputError: all problems of the tables, one per line.
    """
    section, layout = request.job.output, RunLayout(request.job.output.path)
    if section.table is None:
        return ()
    if request.limit is not None:
        return (f"[output] table: --limit is a trial, of which nothing is committed to {section.table}",)
    url = parse_table_url(section.table)
    try:
        wanted = table_schemas(schema, url)
    except ValueError as error:
        raise OutputError(f"[output] table {section.table!r}: {error}; leave it out of [input] passthrough") from error
    problems = [*_find_column_problems(section.replace_where, wanted["results"])]
    for table in ORDER:
        problems += _find_table_problems(url.of_table(table), wanted[table])
    if not problems and not storage.exists(layout.job):
        problems += _find_run(url, run_id)
    if problems:
        raise OutputError("\n".join(problems))
    cut = ", ".join(map(repr, find_cut_times(schema)))
    return (f"[output] table: columns {cut} are cut to microseconds there",) if cut else ()


def _find_column_problems(column: str | None, schema: pa.Schema) -> list[str]:
    if column is None:
        return []
    if column not in schema.names:
        passed = "a column of the results; add it to [input] passthrough"
        return [f"[output] replace_where: expected {passed}, found {column!r}"]
    found = schema.field(column).type
    if not any(has_type(found) for has_type in _TYPES):
        return [
            f"[output] replace_where: expected a column of texts, whole numbers or dates, found {column!r}: {found}"
        ]
    return []


def _find_table_problems(url: TableUrl, wanted: pa.Schema) -> list[str]:
    """What keeps a table from taking the run's rows."""
    table = open_table(url)
    try:
        existing = table.read_schema()
    except Exception as error:  # catalogs and stores have trees of their own, without a common base class
        return [f"[output] table: {table.name}: cannot be reached: {hide_in_message(describe_error(error))}"]
    if existing is None:
        return []
    mend = "write to another table, or rename the column by [input] passthrough"
    return [f"[output] table: {table.name}: {problem}; {mend}" for problem in fit_schemas(existing, wanted).problems]


def _find_run(url: TableUrl, run_id: str) -> list[str]:
    """A new run of a job whose rows the table has already would be paid and then left out."""
    table: Table = "results"
    if (found := open_table(url.of_table(table)).find_commit(run_id)) is None:
        return []
    return [
        f"[output] table: {url}: expected a table without this run, found run {run_id} in it already, by the commit "
        f"{found}; the same job over the same input adds nothing: change one of them, or leave out `table`"
    ]
