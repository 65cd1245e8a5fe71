"""The DuckDB views that are shipped with each run, as `views.sql` in its output folder."""

from pathlib import Path

_FILE = Path(__file__).parent / "check" / "sql" / "views.sql"


def run_views() -> str:
    """The text of `views.sql`; it names the run's tables relative to the folder in which it lies."""
    return _FILE.read_text(encoding="utf-8")
