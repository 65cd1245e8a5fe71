"""The options of `moebeam estimate`. Everything else is imported inside the function, as in `cli.py`."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

from moebeam.jobs.console.console import Answer, AsJson, Debug, Overrides, Quiet, run_and_report
from moebeam.schemas.errors import JobFileError

_ESTIMATE_HELP = """Quote a job: rows, tokens, cache hits and cost by provider and hour, without asking a model.

The input is read and rendered as in a run. The lower bound assumes that every token that can be a cache hit is one \
and that answers are empty, the upper bound no hit and answers as long as max_tokens; with --sample they hold with a \
probability of 99.9%. The length of answers comes from --like, an earlier run's output, or from --output-tokens; \
otherwise max_tokens stands in.

Examples:
  moebeam estimate job.toml
  moebeam estimate job.toml --sample 5000 --like out/last-week
  moebeam estimate job.toml --deadline 2026-12-01T06:00:00Z --provider deepseek --json
"""


def estimate(
    job: Annotated[str, typer.Argument(metavar="JOB.toml", help="Job file: a path or an object-store URL.")],
    overrides: Overrides = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Only the first N rows.")] = None,
    sample: Annotated[
        int | None, typer.Option("--sample", min=2, metavar="N", help="Quote from N rows drawn from the whole input.")
    ] = None,
    at: Annotated[str | None, typer.Option("--at", metavar="INSTANT", help="When the job starts; default now.")] = None,
    provider: Annotated[
        list[str] | None, typer.Option("--provider", help="Only this one beside the job's own. Repeatable.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Model in the price book; default the job's.")] = None,
    like: Annotated[
        str | None, typer.Option("--like", metavar="OUTPUT", help="Output of an earlier run that was like this one.")
    ] = None,
    output_tokens: Annotated[
        float | None, typer.Option("--output-tokens", min=0, metavar="N", help="Mean output tokens of a request.")
    ] = None,
    deadline: Annotated[
        str | None, typer.Option("--deadline", metavar="INSTANT", help="Name the cheapest start that meets it.")
    ] = None,
    currency: Annotated[
        str | None, typer.Option("--currency", metavar="CODE", help="Compare costs in this currency, by --rates.")
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option("--rates", metavar="CSV", help="Dated exchange rates: date, base, quote, rate, source."),
    ] = None,
    is_saved: Annotated[
        bool, typer.Option("--save", help="Keep the quote in the job's output folder, for moebeam report.")
    ] = False,
    is_json: AsJson = False,
    is_quiet: Quiet = False,
    is_debug: Debug = False,
) -> None:
    def work(console: Console) -> tuple[int, Answer]:
        from moebeam.jobs.check.job_file import load_job
        from moebeam.jobs.commands.prices_command import parse_instant
        from moebeam.jobs.quotes.earlier_run import read_earlier_run
        from moebeam.jobs.quotes.quote_job import QuoteTerms, quote_job
        from moebeam.jobs.quotes.quote_record import save_quote
        from moebeam.jobs.quotes.quote_table import print_quote
        from moebeam.transforms.money.exchange_rates import ExchangeRates

        start = parse_instant(at)
        end = parse_instant(deadline, "--deadline") if deadline is not None else None
        if end is not None and end <= start:
            raise JobFileError(f"--deadline: expected an instant after {start.isoformat()}, found {end.isoformat()}")
        terms = QuoteTerms(
            at=start,
            num_sample_rows=sample,
            providers=tuple(provider or ()),
            model=model,
            output_tokens=output_tokens,
            like=read_earlier_run(like) if like is not None else None,
            deadline=end,
            currency=currency,
            rates=ExchangeRates.load(rates) if rates is not None else None,
        )
        quote, identity = quote_job(load_job(job, overrides or ()), terms, limit=limit)
        saved = save_quote(quote, identity) if is_saved else None
        if not is_quiet and not is_json:
            print_quote(console, quote)
            if saved is not None:
                console.print(f"saved: {saved}", soft_wrap=True, markup=False, highlight=False)
        return 0, {"status": "quoted", "exit_code": 0, **quote.to_json(), "saved": saved}

    run_and_report(work, is_json=is_json, is_debug=is_debug)


COMMANDS: tuple[tuple[str, str, Callable[..., None], Mapping[str, Any]], ...] = (
    ("estimate", _ESTIMATE_HELP, estimate, {}),
)
"""Name, help, function and settings, for `jobs/commands/cli.py`."""
