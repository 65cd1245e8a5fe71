"""Options that several commands share."""

from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as sampling.max_tokens=64. Repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON line on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no summary; errors are still shown.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the logs of all libraries.")]
