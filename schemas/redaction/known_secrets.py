"""The secrets that this process knows, and every spelling in which they might come back.

They come from the environment alone and never leave the process: the engine names the variables of its keys when it is
loaded, stores take theirs from the variables and the file that their libraries read. `hide.py` replaces them.
"""

import base64
import configparser
import html
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, quote_plus, unquote

_STORE_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SECURITY_TOKEN",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_CLIENT_SECRET",
    "GOOGLE_OAUTH_ACCESS_TOKEN",
    "GCS_TOKEN",
)
_AWS_FILE_VARIABLE = "AWS_SHARED_CREDENTIALS_FILE"
_AWS_KEYS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:PASSW(?:OR)?D|PASSPHRASE|SECRET|TOKEN|API_?KEY|ACCESS_KEY|PRIVATE_KEY|ACCOUNT_KEY|KEY|CREDENTIAL)(?:_|$)",
    re.I,
)
_USER_INFO = re.compile(r"[a-z][a-z0-9+.-]*://([^/?#\s@:]*):([^/?#\s@]+)@", re.I)

_MIN_CHARACTERS = 6
"""Shorter ones, such as the `none` that local servers take for a key, are no secrets."""
_CERTAIN_CHARACTERS = 16
_MIN_BEGUN_CHARACTERS = 12
"""Least length of a secret whose beginning is hidden, too, and most characters of it that are looked for."""


@dataclass(frozen=True, slots=True)
class Spellings:
    """What to look for.

    Attributes:
        exact: spellings of the run's own secrets, longest first: no other text can be meant.
        in_messages: the same, and those of all other variables that are named like secrets.
        words: the run's own secrets that might be a word or a number; hidden in messages only, as words of their own.
        begun: beginning -> the whole secret, for messages that were cut before they reached us.
    """

    exact: tuple[str, ...]
    in_messages: tuple[str, ...]
    words: re.Pattern[str] | None
    begun: Mapping[str, str]


_learned: set[str] = set()
_found: Spellings | None = None


def is_secret_name(name: str) -> bool:
    """Whether a setting is named like one that holds a secret, such as `s3.secret-access-key`."""
    return _SECRET_NAME.search(re.sub(r"\W", "_", name)) is not None


def learn_secret(secret: str) -> None:
    """Hide a secret from now on, in this process."""
    global _found
    if secret and secret not in _learned:
        _learned.add(secret)
        _found = None


def learn_environment() -> None:
    """Look at the environment again, which may have changed since the first text was hidden."""
    global _found
    _found = None


def forget_secrets() -> None:
    """As if nothing had been learned: for tests, which have keys of their own."""
    _learned.clear()
    learn_environment()


def find_spellings() -> Spellings:
    """What to look for now; gathered once, until something is learned."""
    global _found
    found = _found
    if found is None:
        _found = found = _gather()
    return found


def _gather() -> Spellings:
    own = {*_learned, *_store_secrets(os.environ)}
    others = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and not _is_path(value)} - own
    words = sorted(secret for secret in own if not _is_certain(secret) and len(secret) >= _MIN_CHARACTERS)
    certain = {secret for secret in own | others if _is_certain(secret)}
    return Spellings(
        exact=_longest_first(spelling for secret in certain & own for spelling in spell(secret)),
        in_messages=_longest_first(spelling for secret in certain for spelling in spell(secret)),
        words=re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)") if words else None,
        begun={secret[:_MIN_BEGUN_CHARACTERS]: secret for secret in certain if len(secret) > _MIN_BEGUN_CHARACTERS},
    )


def _store_secrets(environment: Mapping[str, str]) -> Iterator[str]:
    """Credentials of stores, and of every address in the environment, such as a proxy's."""
    yield from (environment[name] for name in _STORE_VARIABLES if environment.get(name))
    for value in environment.values():
        if "://" in value:
            for _, password in _USER_INFO.findall(value):
                yield password
                yield unquote(password)
    path = environment.get(_AWS_FILE_VARIABLE) or "~/.aws/credentials"
    parser = configparser.RawConfigParser(strict=False)
    try:
        parser.read_string(Path(path).expanduser().read_text())
    except (OSError, RuntimeError, ValueError, configparser.Error):
        return
    for section in parser.sections():
        yield from (parser[section][name] for name in _AWS_KEYS if parser[section].get(name))


def _is_path(value: str) -> bool:
    return value.startswith(("/", "./", "~"))


def _is_certain(secret: str) -> bool:
    """Whether a text that holds it cannot mean anything else: no word, no number, and not short."""
    has_letter, is_plain = any(map(str.isalpha, secret)), secret.isalpha()
    return len(secret) >= _CERTAIN_CHARACTERS or (len(secret) >= _MIN_CHARACTERS and has_letter and not is_plain)


def _longest_first(spellings: Iterable[str]) -> tuple[str, ...]:
    # One may be part of another, whose rest would stay.
    return tuple(sorted(set(spellings), key=lambda spelling: (-len(spelling), spelling)))


def spell(secret: str) -> set[str]:
    """A secret as it is, and as URLs, JSON, HTML, Python and Base64 write it."""
    quoted = {quote(secret, safe=""), quote(secret), quote_plus(secret)}
    lower = {re.sub(r"%[0-9A-F]{2}", lambda found: found[0].lower(), text) for text in quoted}
    escaped = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]}
    escaped |= {text.replace("/", r"\/") for text in escaped}
    escaped |= {json.dumps(text)[1:-1] for text in escaped}
    return {secret, html.escape(secret), *quoted, *lower, *escaped, *_spell_in_base64(secret)}


def _spell_in_base64(secret: str) -> Iterator[str]:
    """The characters that are the secret's alone, wherever it begins in what is encoded, such as `user:password`."""
    content = secret.encode(errors="surrogatepass")
    if len(content) < _MIN_BEGUN_CHARACTERS:
        return
    for num_before in range(3):
        encoded = base64.b64encode(b"\0" * num_before + content).decode()
        # A character holds 6 bits: the first of 8 * num_before is at bit 0, and none of them may be ours and not ours.
        own = encoded[-(-8 * num_before // 6) : 8 * (num_before + len(content)) // 6]
        yield own
        yield own.replace("+", "-").replace("/", "_")
