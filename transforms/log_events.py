"""Log events of all stages, with the run, shard and request that they are about.

Events are records of the logger `moebeam` at level INFO, one line of `key=value` each; the same fields are in the
record's attribute `moebeam`, for handlers that write JSON. They hold no prompts, answers or keys.
"""

import json
import logging

_LOGGER = logging.getLogger("moebeam")


def log_event(event: str, **fields: str | float | None) -> None:
    """Log an event; fields that are None are left out."""
    if _LOGGER.isEnabledFor(logging.INFO):
        given = {name: value for name, value in fields.items() if value is not None}
        text = " ".join(f"{name}={_format_value(value)}" for name, value in given.items())
        _LOGGER.info("%s %s", event, text, extra={"moebeam": {"event": event, **given}})


def _format_value(value: str | float) -> str:
    """A value as one word of a line: texts that would not be one are quoted as in JSON."""
    if not isinstance(value, str):
        return str(value)
    is_plain = value.isprintable() and not any(letter in value for letter in ' ="') and value
    return value if is_plain else json.dumps(value)
