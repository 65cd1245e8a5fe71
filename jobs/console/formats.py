"""Amounts, durations and sizes as a person reads them; files hold the exact values."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moebeam.transforms.durable.progress import OutageNote


def escape_control_characters(text: str) -> str:
    """Replace control characters, which a terminal would obey, by their codes."""
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)


def format_duckdb_command(query: str, path: str) -> str:
    """A shell line that runs `query` with `path` in place of `{}`, quoted for SQL and for the shell."""
    sql = query.format(path.replace("'", "''"))
    for special in ("\\", '"', "$", "`"):
        sql = sql.replace(special, f"\\{special}")
    return f'duckdb -c "{sql}"'


def format_money(amount: Decimal, currency: str | None) -> str:
    """Two decimals, or three significant digits below 1."""
    # adjusted() is the exponent of the first digit that is not zero.
    num_digits = 2 if amount == 0 or abs(amount) >= 1 else 2 - amount.adjusted()
    text = f"{amount:,.{num_digits}f}"
    return f"{text} {currency}" if currency else text


def format_duration(seconds: float) -> str:
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02} min"


def format_bytes(num_bytes: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" or num_bytes >= 100 else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"


def format_outage(outage: "OutageNote", now: datetime | None = None) -> str:
    """An outage in one line, its start in local time; `now` has a time zone."""
    left_s = (outage.next_try_at - (now or datetime.now(UTC))).total_seconds()
    when = f"next try in {left_s:.0f} s" if left_s >= 0.5 else "trying again"
    return f"{outage.provider} unreachable since {outage.since.astimezone():%H:%M}, {when}: {outage.message}"


def format_outage_end(outage: "OutageNote", now: datetime | None = None) -> str:
    """That an outage is over, and how long it took."""
    lasted_s = ((now or datetime.now(UTC)) - outage.since).total_seconds()
    return f"{outage.provider} answers again after {max(0.0, lasted_s):,.0f} s"
