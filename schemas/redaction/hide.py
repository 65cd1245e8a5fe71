"""Hides secrets in text from outside, where it is written or shown; the one place that does.

Texts of answers lose exactly the run's own secrets, so that answers which are equal stay equal whoever wrote them.
Messages, of which nobody needs each character, also lose what only looks like a secret.
"""

import re
from dataclasses import replace

from moebeam.schemas.errors import RowError
from moebeam.schemas.records import Completion, TokenLogprob, ToolCall
from moebeam.schemas.redaction.known_secrets import Spellings, find_spellings

HIDDEN = "[key]"

_LIKE_A_SECRET = re.compile(
    r"""
    (?P<before>\b(?:bearer|basic)\s+)(?=\S*\d)[\w.~+/=-]{8,}
  | (?P<user>\b[a-z][a-z0-9+.-]{0,31}://)[^/?\#\s@:]*:[^/?\#\s@]+(?=@)
  | (?P<name>\b(?:x-)?(?:api[-_]?key|access[-_]?token|client[-_]?secret|secret[-_]?access[-_]?key|passw(?:or)?d)
      ["']?\s*[=:]\s*["']?)(?=[^\s"'&,;}]*\d)[^\s"'&,;}]{6,}
  | (?P<query>[?&](?:x-amz-(?:signature|credential|security-token)|sig|signature|token|key)=)[^&\s"']+
  | \b(?:sk|rk|pk)-[\w-]{16,}
  | \b(?:hf|ghp|gho|gsk|xai)[_-]\w{16,}
  | \bAIza[\w-]{30,}
  | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b
    """,
    re.IGNORECASE | re.VERBOSE,
)


def hide_secrets(text: str) -> str:
    """A text without the run's own secrets, in whatever spelling; else unchanged."""
    for spelling in find_spellings().exact:
        if spelling in text:
            text = text.replace(spelling, HIDDEN)
    return text


def hide_in_bytes(content: bytes) -> bytes:
    """As `hide_secrets`, of UTF-8; JSON stays JSON."""
    for spelling in find_spellings().exact:
        if (encoded := spelling.encode(errors="surrogatepass")) in content:
            content = content.replace(encoded, HIDDEN.encode())
    return content


def has_secret(text: str) -> bool:
    """Whether a text holds one of the run's own secrets."""
    return any(spelling in text for spelling in find_spellings().exact)


def hide_in_message(text: str) -> str:
    """A message without secrets, parts of secrets where it was cut, and what looks like one."""
    known = find_spellings()
    for spelling in known.in_messages:
        if spelling in text:
            text = text.replace(spelling, HIDDEN)
    text = _hide_begun(text, known)
    if known.words is not None:
        text = known.words.sub(HIDDEN, text)
    return _LIKE_A_SECRET.sub(_keep_name, text)


def _hide_begun(text: str, known: Spellings) -> str:
    for beginning, secret in known.begun.items():
        while (start := text.find(beginning)) >= 0:
            end = start + len(beginning)
            while end < len(text) and end - start < len(secret) and text[end] == secret[end - start]:
                end += 1
            text = text[:start] + HIDDEN + text[end:]
    return text


def _keep_name(found: re.Match[str]) -> str:
    return "".join(part for part in found.groups() if part is not None) + HIDDEN


def hide_in_error(error: RowError) -> RowError:
    """The same error, with its message as it may be written."""
    message = str(error)
    hidden = hide_in_message(message)
    return error if hidden == message else type(error)(hidden)


def hide_in_exception(error: BaseException) -> None:
    """Hide secrets in the messages of an exception and of all that caused it: runners send and print tracebacks."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        waiting += (each.__cause__, each.__context__)
        each.args = tuple(hide_in_message(value) if isinstance(value, str) else value for value in each.args)
        if isinstance(each, OSError) and isinstance(each.strerror, str):
            each.strerror = hide_in_message(each.strerror)


def hide_in_completion(completion: Completion) -> Completion:
    """An answer as it may be journaled and written; the same one if nothing in it is secret."""
    spellings = find_spellings().exact
    error = completion.error and hide_in_error(completion.error)
    if error is not completion.error:
        completion = replace(completion, error=error)
    if not spellings:
        return completion
    parts = [
        completion.text,
        completion.model_revision,
        completion.reasoning_content,
        completion.provider_finish_reason,
    ]
    for call in completion.tool_calls:
        parts += (call.id, call.name, call.arguments)
    for place in completion.top_logprobs or ():
        parts += [likely.token for likely in place]
    # One text to search, in which none begins in one part and ends in another.
    whole = "\n".join(filter(None, parts))
    for spelling in spellings:
        if spelling in whole:
            return _hide_in_parts(completion)
    return completion


def _hide_in_parts(completion: Completion) -> Completion:
    text, reasoning = hide_secrets(completion.text), completion.reasoning_content
    reason, likeliest = completion.provider_finish_reason, completion.top_logprobs
    if likeliest is not None:
        # The tokens of a secret spell it, whatever each of them is.
        is_spelled = text != completion.text or (reasoning is not None and hide_secrets(reasoning) != reasoning)
        likeliest = tuple(
            tuple(TokenLogprob(HIDDEN if is_spelled else hide_secrets(one.token), one.logprob) for one in place)
            for place in likeliest
        )
    return replace(
        completion,
        text=text,
        reasoning_content=reasoning and hide_secrets(reasoning),
        model_revision=hide_secrets(completion.model_revision),
        provider_finish_reason=reason and hide_secrets(reason),
        tool_calls=tuple(
            ToolCall(hide_secrets(call.id), hide_secrets(call.name), hide_secrets(call.arguments))
            for call in completion.tool_calls
        ),
        top_logprobs=likeliest,
    )
