"""Log events of all stages, with the run, shard and request that they run_and_report of.

Events are records of the logger `moebeam` at level INFO, one line of `key=value` each; the same fields are in the
record's attribute `moebeam`, for handlers that write JSON. They hold no prompts, answers or keys.
"""

import json
import logging

_LOGGER = logging.getLogger("moebeam")


def log_event(event: str, **fields: str | float | None) -> None:
    """Log an event; fields that are None are left out."""
    if _LOGGER.isEnabledFor(logging.INFO):
        told = {name: value for name, value in fields.items() if value is not None}
        text = " ".join(f"{name}={_spelled(value)}" for name, value in told.items())
        _LOGGER.info("%s %s", event, text, extra={"moebeam": {"event": event, **told}})


def _spelled(value: str | float) -> str:
    """A value as one word of a line: texts that would not be one are quoted as in JSON."""
    if not isinstance(value, str):
        return str(value)
    is_plain = value.isprintable() and not any(letter in value for letter in ' ="') and value
    return value if is_plain else json.dumps(value)
