"""`moebeam serve | serve-key`: OpenAI's Batch API over run folders.

As in `jobs/commands/cli.py`, everything else is imported inside commands.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

from moebeam.jobs.console.console import Answer, AsJson, Debug, run_and_report

_SERVE_HELP = """Serve OpenAI's Files and Batches: a batch that a client creates becomes a run of a job file.

The job file says which engine and model answer, and what a row may ask for; its input and output path are those of \
each batch. Batches wait in line, one run at a time or --runs of them, tenants in turn. A server that is killed goes \
on where it was at its next start. Signals stop the runs that are at work; they go on, too.

Without --keys it answers this machine alone. moebeam serve-key makes keys, a file of their digests, and tenants, \
which see nothing of each other. /metrics is for Prometheus.

Examples:
  moebeam serve batches --job job.toml
  moebeam serve batches --job job.toml --host 0.0.0.0 --keys keys.json --runs 2
"""
_KEY_HELP = """Make an API key for a tenant of moebeam serve, print it once, and add its digest to a file.

Example:
  moebeam serve-key keys.json acme
"""


def serve(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Where files, batches and runs are kept, on disk.")],
    job: Annotated[str, typer.Option("--job", metavar="JOB.toml", help="Job file that answers every batch.")],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65_535, help="Port to listen on.")] = 8000,
    keys: Annotated[str | None, typer.Option("--keys", metavar="FILE", help="Digests of the tenants' keys.")] = None,
    runs: Annotated[int, typer.Option("--runs", min=1, metavar="N", help="Most batches that run at a time.")] = 1,
    max_file_bytes: Annotated[int, typer.Option("--max-file-bytes", min=1, metavar="N", help="Of an upload.")] = 200
    << 20,
    max_file_lines: Annotated[
        int, typer.Option("--max-file-lines", min=1, metavar="N", help="Requests of an upload.")
    ] = 50_000,
    is_debug: Debug = False,
) -> None:
    def work(console: Console) -> tuple[int, Answer]:
        from moebeam.schemas.extras import require_extra

        require_extra("serve", "moebeam serve")
        from moebeam.jobs.serve.serve import serve as serve_folder
        from moebeam.jobs.serve.upload import UploadLimits

        shown = f"[{host}]" if ":" in host else host
        console.print(f"serving {folder} at http://{shown}:{port}/v1", soft_wrap=True, markup=False, highlight=False)
        limits = UploadLimits(max_file_bytes, max_file_lines)
        serve_folder(folder, job, host=host, port=port, keys=keys, num_runs=runs, limits=limits)
        return 0, {"status": "stopped", "exit_code": 0}

    run_and_report(work, is_json=False, is_debug=is_debug)


def serve_key(
    keys: Annotated[str, typer.Argument(metavar="FILE", help="The server's file of keys; made if it is missing.")],
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="Whose key it is.")],
    is_json: AsJson = False,
    is_debug: Debug = False,
) -> None:
    def work(console: Console) -> tuple[int, Answer]:
        from moebeam.jobs.serve.keys import add_key

        key = add_key(keys, tenant)
        if not is_json:
            console.print(key, soft_wrap=True, markup=False, highlight=False)
            console.print(f"This is the only time that it is shown; {keys} keeps its digest.", highlight=False)
        return 0, {"status": "made", "exit_code": 0, "tenant": tenant, "key": key}

    run_and_report(work, is_json=is_json, is_debug=is_debug)


COMMANDS: tuple[tuple[str, str, Callable[..., None], Mapping[str, Any]], ...] = (
    ("serve", _SERVE_HELP, serve, {}),
    ("serve-key", _KEY_HELP, serve_key, {}),
)
"""Name, help, function and settings of each command here, for `jobs/commands/cli.py`."""
