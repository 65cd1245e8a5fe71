"""`moebeam export`: a run's answers in the form of other programs, from its output folder.

As in `jobs/commands/cli.py`, Beam and pyarrow are imported inside commands.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

from moebeam.jobs.commands.output_commands import OutputPath, parse_output_folder
from moebeam.jobs.console.console import Answer, AsJson, Debug, Quiet, run_and_report

_EXPORT_HELP = """Write a run's answers as the files of OpenAI's Batch API.

output.jsonl has a line for each answer, with a chat completion as its body; error.jsonl has one for each reject. Both \
are always written, and the same run gives the same bytes. A run that is not finished is refused, unless --partial \
asks for what it has: the rows of finished shards, and answers that arrived for others, as the model gave them.

Examples:
  moebeam export out --openai-batch files
  moebeam export s3://bucket/out --openai-batch s3://bucket/files --json
"""


def export(
    output: OutputPath,
    openai_batch: Annotated[
        str, typer.Option("--openai-batch", metavar="FOLDER", help="Where the two files go: a path or a URL.")
    ],
    is_partial: Annotated[bool, typer.Option("--partial", help="Export an unfinished run as far as it is.")] = False,
    is_json: AsJson = False,
    is_quiet: Quiet = False,
    is_debug: Debug = False,
) -> None:
    def work(console: Console) -> tuple[int, Answer]:
        folder = parse_output_folder(output, "moebeam export OUTPUT")
        target = parse_output_folder(openai_batch, "--openai-batch FOLDER")
        from moebeam.jobs.output.batch_export import export_batch
        from moebeam.jobs.output.run_record import read_record

        made = export_batch(read_record(folder), target, is_partial=is_partial)
        if not is_quiet:
            for path, count, what in (
                (made.output_file, made.num_answers, "answers"),
                (made.error_file, made.num_errors, "errors"),
            ):
                console.print(f"wrote {count:,} {what} to {path}", highlight=False, markup=False, soft_wrap=True)
            if made.run_status == "incomplete":
                console.print("the run is not finished: the other rows are in neither file", highlight=False)
            if made.num_journaled:
                note = "not validated yet: they come from journals of shards that are not finished"
                console.print(f"{made.num_journaled:,} of these lines are {note}", highlight=False)
        return 0, {"status": "exported", "exit_code": 0, **made.to_json()}

    run_and_report(work, is_json=is_json, is_debug=is_debug)


COMMANDS: tuple[tuple[str, str, Callable[..., None], Mapping[str, Any]], ...] = (("export", _EXPORT_HELP, export, {}),)
"""Name, help, function and settings of each command here, for `jobs/commands/cli.py`."""
