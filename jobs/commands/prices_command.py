"""`moebeam prices list | check | diff`: inspect a price book, by default the one that ships with the program."""

from datetime import UTC, datetime
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from moebeam.jobs.console.console import Answer, AsJson, Debug, run_and_report
from moebeam.schemas.errors import JobFileError
from moebeam.schemas.prices import PriceLine
from moebeam.schemas.providers import name_provider, suggest_provider
from moebeam.transforms.money.price_book import PriceBook
from moebeam.transforms.money.price_review import Change, diff, format_hours, list_changed_fields, prices_at, review

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Inspect dated prices: which hold, whether a price book is sound, what changed.",
)

BookPath = Annotated[
    str | None, typer.Argument(metavar="[BOOK]", help="Price book, CSV or TOML; default `builtin`, the shipped one.")
]
At = Annotated[
    str | None, typer.Option("--at", metavar="INSTANT", help="Such as 2026-11-24T09:30:00+08:00; default now.")
]


@app.command(name="list")
def list_prices(
    book: BookPath = None,
    at: At = None,
    provider: Annotated[str | None, typer.Option("--provider", help="Only this provider.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Only this model.")] = None,
    is_json: AsJson = False,
    is_debug: Debug = False,
) -> None:
    """The prices that hold at an instant, per 1,000,000 tokens."""

    def work(console: Console) -> tuple[int, Answer]:
        instant = parse_instant(at)
        prices = load_book(book)
        lines = [
            line
            for line in prices_at(prices, instant)
            if (provider is None or line.provider == name_provider(provider)) and model in (None, line.model)
        ]
        if not lines:
            raise JobFileError(
                f"{prices.version}: expected a price that holds at {instant.isoformat()}"
                f"{f' of provider {provider!r}' if provider else ''}"
                f"{f' of model {model!r}' if model else ''}, found none"
                f"{suggest_provider(provider, sorted({line.provider for line in prices.lines})) if provider else ''}"
            )
        if not is_json:
            console.print(Text(f"prices at {instant.isoformat()} by {prices.version}", style="bold"))
            for row in _format_rows(lines):
                console.print(Text(row), soft_wrap=True)
        return 0, {
            "exit_code": 0,
            "price_book": prices.version,
            "at": instant.isoformat(),
            "prices": [line_json(line) for line in lines],
        }

    run_and_report(work, is_json=is_json, is_debug=is_debug)


@app.command()
def check(
    book: BookPath = None,
    at: At = None,
    against: Annotated[
        Literal["genai-prices"] | None,
        typer.Option("--against", help="Compare with the prices of this package, for the week from --at on."),
    ] = None,
    is_json: AsJson = False,
    is_debug: Debug = False,
) -> None:
    """Check a price book. Overlaps and malformed lines are errors (exit code 2); gaps, ended prices and calendars that
    run out are shown; prices that differ from --against end with exit code 1."""

    def work(console: Console) -> tuple[int, Answer]:
        instant = parse_instant(at)
        prices = load_book(book)
        findings = list(review(prices, instant))
        answer: dict[str, object] = {
            "price_book": prices.version,
            "num_lines": len(prices.lines),
            "findings": [
                {"kind": found.kind, "provider": found.provider, "model": found.model, "message": found.message}
                for found in findings
            ],
        }
        _print(console, f"{prices.version}: {len(prices.lines)} lines, none overlaps another", is_json, "bold")
        for found in findings:
            _print(console, f"{found.kind}: {found.provider} {found.model}: {found.message}", is_json, "yellow")
        exit_code = 0
        if against is not None:
            from moebeam.jobs.reports.price_cross_check import PACKAGE, cross_check

            compared = cross_check(prices, instant)
            exit_code = 1 if compared.differences else 0
            answer["against"] = {
                "package": f"{PACKAGE} {compared.version}",
                "num_compared": compared.num_compared,
                "unknown": [list(pair) for pair in compared.unknown],
                "differences": [
                    {
                        "provider": found.provider,
                        "model": found.model,
                        "token_class": found.token_class,
                        "at": found.at.isoformat(),
                        "ours": format(found.ours.normalize(), "f"),
                        "theirs": format(found.theirs.normalize(), "f"),
                    }
                    for found in compared.differences
                ],
            }
            summary = f"{compared.num_compared:,} prices compared with {PACKAGE} {compared.version}"
            _print(console, f"{summary}: {len(compared.differences)} differ", is_json, "bold")
            for found in compared.differences:
                message = (
                    f"differs: {found.provider} {found.model}, {found.token_class} at {found.at.isoformat()}: "
                    f"{found.ours.normalize():f} here, {found.theirs.normalize():f} there"
                )
                _print(console, message, is_json, "red")
            for provider, model in compared.unknown:
                _print(console, f"not compared: it does not know {provider} {model}", is_json, "dim")
        return exit_code, {"exit_code": exit_code, **answer}

    run_and_report(work, is_json=is_json, is_debug=is_debug)


@app.command(name="diff")
def diff_books(
    before: Annotated[str, typer.Argument(metavar="BEFORE", help="A price book.")],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="Another one.")],
    is_json: AsJson = False,
    is_debug: Debug = False,
) -> None:
    """What changed from one price book to another."""

    def work(console: Console) -> tuple[int, Answer]:
        old, new = load_book(before), load_book(after)
        changes = diff(old, new)
        _print(console, f"{old.version} -> {new.version}: {len(changes)} lines differ", is_json, "bold")
        for change in changes:
            _print(console, _format_change(change), is_json, _STYLES[change.kind])
        return 0, {
            "exit_code": 0,
            "before": old.version,
            "after": new.version,
            "changes": [
                {
                    "kind": change.kind,
                    "fields": list_changed_fields(change),
                    "before": change.before and line_json(change.before),
                    "after": change.after and line_json(change.after),
                }
                for change in changes
            ],
        }

    run_and_report(work, is_json=is_json, is_debug=is_debug)


_STYLES = {"added": "green", "removed": "red", "changed": "yellow"}


def load_book(path: str | None) -> PriceBook:
    """A price book of the user's, or the shipped one."""
    from moebeam.jobs.prices.shipped import load_named_book

    return load_named_book(path)


def parse_instant(text: str | None, option: str = "--at") -> datetime:
    """The instant that an option names, in UTC; now where it is not given.

    Raises:
        JobFileError: it is no time, or names no time zone.
    """
    if text is None:
        return datetime.now(UTC).replace(microsecond=0)
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        raise JobFileError(f"{option}: expected a time with its zone such as 2026-11-24T09:30:00Z, found {text!r}")
    return found.astimezone(UTC)


def line_json(line: PriceLine) -> dict[str, object]:
    """A price line for programs; prices are text, so that no digit is lost."""
    return {
        "line": line.line_id,
        "provider": line.provider,
        "model": line.model,
        "mode": line.mode,
        "effective_from_utc": line.effective_from.isoformat(),
        "effective_to_utc": line.effective_to and line.effective_to.isoformat(),
        "when": format_hours(line),
        "prompt_tokens": _format_tier(line),
        "currency": line.currency,
        "cache_hit_per_mtok": None if line.cache_hit is None else format(line.cache_hit, "f"),
        "cache_miss_per_mtok": format(line.cache_miss, "f"),
        "output_per_mtok": format(line.output, "f"),
        "evidence": line.evidence,
    }


def _format_rows(lines: list[PriceLine]) -> list[str]:
    """Lines of text, each column as wide as its widest cell; a terminal may be narrower, prices stay readable."""
    rows = [("line", "provider", "model", "hit", "miss", "output", "currency", "holds")]
    for line in lines:
        holds = " ".join(
            filter(None, ("" if line.mode == "online" else line.mode, _format_tier(line), format_hours(line)))
        )
        hit = "unknown" if line.cache_hit is None else format(line.cache_hit, "f")
        prices = (hit, format(line.cache_miss, "f"), format(line.output, "f"))
        rows.append((line.line_id, line.provider, line.model, *prices, line.currency, holds or "always"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _format_tier(line: PriceLine) -> str:
    if line.min_prompt_tokens == 0 and line.max_prompt_tokens is None:
        return ""
    return f"{line.min_prompt_tokens}-{'' if line.max_prompt_tokens is None else line.max_prompt_tokens} tokens"


def _format_change(change: Change) -> str:
    line = change.line
    name = " ".join(filter(None, (line.provider, line.model, line.mode, format_hours(line))))
    since = line.effective_from.isoformat().replace("+00:00", "Z")
    if change.before is None or change.after is None:
        hit = "unknown" if line.cache_hit is None else line.cache_hit
        prices = f"hit {hit}, miss {line.cache_miss}, output {line.output} {line.currency}"
        return f"{change.kind}: {name} from {since}: {prices}"
    changes = [
        f"{field} {getattr(change.before, field)} -> {getattr(change.after, field)}"
        for field in list_changed_fields(change)
    ]
    return f"{change.kind}: {name} from {since}: {', '.join(changes)}"


def _print(console: Console, message: str, is_json: bool, style: str) -> None:
    if not is_json:
        console.print(Text(message, style=style), soft_wrap=True)
