"""No spelling of a key is written, answers lose nothing else, and logs and tracebacks are no way around it."""

import base64
import html
import io
import json
import logging
import re
import threading
from collections.abc import Generator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.schemas.errors import AnswerInterrupted
from moebeam.schemas.records import NOTHING_USED, Completion, TokenLogprob, ToolCall
from moebeam.schemas.redaction.guard_logs import HidingStream, guard_logs
from moebeam.schemas.redaction.hide import (
    HIDDEN,
    has_secret,
    hide_in_completion,
    hide_in_exception,
    hide_in_message,
    hide_secrets,
)
from moebeam.schemas.redaction.known_secrets import forget_secrets, learn_environment, learn_secret, spell

KEY = 'sk-planted/key+0123456789 ü"é'
"""One that every spelling changes."""


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Generator[None]:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    forget_secrets()
    learn_secret(KEY)
    yield
    forget_secrets()


SPELLINGS = {
    "plain": KEY,
    "quoted": quote(KEY, safe=""),
    "quoted as a path": quote(KEY),
    "quoted as a form": quote_plus(KEY),
    "quoted in lower case": re.sub("%..", lambda found: found[0].lower(), quote(KEY, safe="")),
    "JSON": json.dumps(KEY)[1:-1],
    "JSON as it is read": json.dumps(KEY, ensure_ascii=False)[1:-1],
    "JSON of PHP": json.dumps(KEY)[1:-1].replace("/", "\\/"),
    "JSON in JSON": json.dumps(json.dumps(KEY))[3:-3],
    "HTML": html.escape(KEY),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_is_hidden_and_nothing_else(spelling: str) -> None:
    assert hide_secrets(f"before {spelling} after") == f"before {HIDDEN} after"
    assert hide_in_message(f"before {spelling} after") == f"before {HIDDEN} after"


@given(st.binary(max_size=7), st.binary(max_size=7), st.booleans())
def test_base64_of_a_key_among_other_bytes_is_hidden(before: bytes, after: bytes, is_for_urls: bool) -> None:
    encode = base64.urlsafe_b64encode if is_for_urls else base64.b64encode
    hidden = hide_secrets(encode(before + KEY.encode() + after).decode())
    assert HIDDEN in hidden
    # At most the characters that hold bits of both are left: of the key that is nothing.
    assert len(hidden) <= len(HIDDEN) + 4 * (-(-len(before) // 3) + -(-len(after) // 3)) + 4


@given(st.text())
def test_a_text_without_a_key_is_the_same(text: str) -> None:
    assert hide_secrets(text) == text


@given(st.integers(13, len(KEY)))
def test_a_key_that_was_cut_is_hidden_in_messages(num_kept: int) -> None:
    assert hide_in_message(f"x: found '{KEY[:num_kept]}...") == f"x: found '{HIDDEN}..."


@pytest.mark.parametrize(
    ("message", "hidden"),
    [
        ("Authorization: Bearer abc123def456", "Authorization: Bearer [key]"),
        ("no key sk-0123456789abcdef0123 there", "no key [key] there"),
        ("at s3://user:pass@host/x", "at s3://[key]@host/x"),
        ('{"api_key": "q9w8e7r6"}', '{"api_key": "[key]"}'),
        ("GET /x?a=1&X-Amz-Signature=abcdef&b=2", "GET /x?a=1&X-Amz-Signature=[key]&b=2"),
        ("AKIA0123456789ABCDEF is unknown", "[key] is unknown"),
    ],
)
def test_what_looks_like_a_secret_goes_from_messages_and_stays_in_answers(message: str, hidden: str) -> None:
    assert hide_in_message(message) == hidden
    assert hide_secrets(message) == message


@pytest.mark.parametrize(
    "message",
    [
        "basic authentication is needed",
        "[model] api_key_variable: expected the key of 'x' in the environment variable X, found none",
        "task-0123456789-0123456789 took 3 s",
        "row 'sk-7': expected password: a string",
    ],
)
def test_ordinary_messages_stay(message: str) -> None:
    assert hide_in_message(message) == message


def test_a_key_that_may_be_a_word_is_hidden_in_messages_alone_and_a_short_one_nowhere() -> None:
    for word in ("placeholder", "EMPTY", "123456"):
        learn_secret(word)
    text = "a placeholder or placeholders, EMPTY, 123456 or 1234567"
    assert hide_secrets(text) == text
    assert hide_in_message(text) == "a [key] or placeholders, EMPTY, [key] or 1234567"


def test_credentials_of_stores_and_proxies_are_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id = AK0FILE\naws_secret_access_key = from/file+1\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "from-variable-2")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:pa%2Fss-3@proxy:3128")
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "of-another-4")
    learn_environment()
    for secret in ("AK0FILE", "from/file+1", "from-variable-2", "pa%2Fss-3", "pa/ss-3"):
        assert has_secret(f"x{secret}x"), secret
    # Nobody whom the run asks can know it: answers keep it.
    assert not has_secret("of-another-4")
    assert hide_in_message("of-another-4") == HIDDEN


def test_the_longest_of_nested_spellings_goes_first() -> None:
    learn_secret(KEY[:15])
    assert hide_secrets(KEY) == HIDDEN
    assert all(hide_secrets(spelling) == HIDDEN for spelling in spell(KEY))


def completion(text: str = "fine") -> Completion:
    return Completion(
        request_id="0",
        text=text,
        finish_reason="stop",
        usage=NOTHING_USED,
        started_at=datetime(2026, 1, 1, tzinfo=UTC),
        latency_ms=1.0,
        provider="p",
        model="m",
        model_revision=f"m {text}",
        reasoning_content=f"because {text}",
        tool_calls=(ToolCall(f"call {text}", f"f {text}", json.dumps({"a": text})),),
        error=AnswerInterrupted(f"why {text}"),
        provider_finish_reason=f"end {text}",
        top_logprobs=((TokenLogprob(f"t {text}", -1.0),),),
    )


def test_an_answer_loses_the_key_in_every_field_and_is_itself_without_one() -> None:
    # Where a text held a key, the tokens that spell it are hidden whole.
    expected = replace(completion(HIDDEN), top_logprobs=((TokenLogprob(HIDDEN, -1.0),),))
    assert repr(hide_in_completion(completion(KEY))) == repr(expected)
    plain = completion()
    assert hide_in_completion(plain) is plain


def test_tokens_that_spell_a_key_one_after_the_other_are_hidden() -> None:
    places = tuple((TokenLogprob(letter, -1.0),) for letter in KEY)
    answer = Completion("0", KEY, "stop", NOTHING_USED, datetime.now(UTC), 1.0, "p", "m", "", top_logprobs=places)
    hidden = hide_in_completion(answer).top_logprobs
    assert hidden is not None
    assert {one.token for (one,) in hidden} == {HIDDEN}
    assert len(hidden) == len(places)


def test_logs_and_tracebacks_hold_no_key(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogRecordFactory()
    try:
        guard_logs()
        guard_logs()
        logger = logging.getLogger("some.library")
        logger.warning("asked with %s", KEY)
        try:
            raise ValueError(f"bad {KEY}")
        except ValueError:
            logger.exception("it failed")
        logger.warning("fine %s", "words")
    finally:
        logging.setLogRecordFactory(before)
    kept = caplog.records
    assert [record.getMessage().partition("\n")[0] for record in kept] == [
        f"asked with {HIDDEN}",
        "it failed",
        "fine words",
    ]
    assert f"ValueError: bad {HIDDEN}" in kept[1].getMessage()


def test_an_exception_and_its_causes_hold_no_key() -> None:
    try:
        try:
            raise OSError(5, f"store said {KEY}")
        except OSError as cause:
            raise RuntimeError(f"broken by {KEY}", 7) from cause
    except RuntimeError as error:
        error.__cause__.__context__ = error  # type: ignore[union-attr]
        hide_in_exception(error)
        assert str(error) == f"('broken by {HIDDEN}', 7)"
        assert str(error.__cause__) == f"[Errno 5] store said {HIDDEN}"


def test_a_stream_hides_keys_that_are_written_in_pieces_from_several_threads() -> None:
    sink = io.StringIO()
    stream = HidingStream(sink)
    for piece in (KEY[:9], KEY[9:], " and\n", "more"):
        stream.write(piece)
    assert sink.getvalue() == f"{HIDDEN} and\n"
    threads = [threading.Thread(target=stream.write, args=(f"\nline {KEY}",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stream.close()
    assert sink.getvalue() == "\n".join([f"{HIDDEN} and", "more", *[f"line {HIDDEN}"] * 4, ""])
