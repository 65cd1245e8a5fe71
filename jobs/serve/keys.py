"""API keys of a batch server: which tenant a request is of. The file holds digests, never keys.

    {"acme": ["<SHA-256 of a key, in hex>", ...], "globex": [...]}

Keys are drawn here with 256 random bits, so that a plain digest of one says nothing about it.
"""

import hashlib
import hmac
import json
import os
import re
import secrets
from pathlib import Path
from typing import cast

from moebeam.schemas.errors import JobFileError, OutputError
from moebeam.schemas.store import storage

LOCAL_TENANT = "local"
"""Of a server without keys, which answers this machine alone."""

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PREFIX = "sk-moebeam-"


class Keys:
    """The keys of a file, read again whenever it changes; without a file, everyone is `LOCAL_TENANT`."""

    def __init__(self, path: str | None) -> None:
        """
        Raises:
            JobFileError: the file cannot be read, or is not such a file.
        """
        self._path = path
        self._mark: tuple[int, int] | None = None
        self._tenants: list[tuple[bytes, str]] = []
        if path is not None:
            self._read(path)

    @property
    def are_needed(self) -> bool:
        return self._path is not None

    def find_tenant(self, authorization: str | None) -> str | None:
        """The tenant of a request's `Authorization` header; None if the key is missing or unknown.

        Every digest is compared, each in constant time: how long it takes says nothing about keys.
        """
        if self._path is None:
            return LOCAL_TENANT
        self._read_again(self._path)
        scheme, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).hexdigest().encode()
        found = [tenant for digest, tenant in self._tenants if hmac.compare_digest(digest, given)]
        return found[0] if found and scheme.lower() == "bearer" else None

    def _read_again(self, path: str) -> None:
        try:
            stat = os.stat(path)
        except OSError:
            return  # the keys read last hold
        if (stat.st_mtime_ns, stat.st_size) != self._mark:
            try:
                self._read(path)
            except JobFileError:
                return  # half written: the keys read last hold

    def _read(self, path: str) -> None:
        tenants = _read_tenants(path)
        stat = os.stat(path)
        self._mark = (stat.st_mtime_ns, stat.st_size)
        self._tenants = [(digest.encode(), tenant) for tenant, digests in tenants.items() for digest in digests]


def add_key(path: str, tenant: str) -> str:
    """Draw a key for a tenant, add its digest to the file, and return the key, which is kept nowhere.

    Raises:
        JobFileError: the tenant's name or the file is not as expected.
        OutputError: the file cannot be written.
    """
    if not _TENANT.fullmatch(tenant):
        raise JobFileError(
            f"TENANT: expected up to 64 letters, digits, dots, dashes and underscores, a letter or digit first, "
            f"found {tenant!r}"
        )
    tenants = _read_tenants(path) if Path(path).exists() else {}
    key = _PREFIX + secrets.token_urlsafe(32)
    tenants.setdefault(tenant, []).append(hashlib.sha256(key.encode()).hexdigest())
    try:
        storage.write_whole(path, json.dumps(tenants, indent=2).encode() + b"\n")
        os.chmod(path, 0o600)
    except OSError as error:
        raise OutputError(f"{path}: the key cannot be kept: {error}") from error
    return key


def _read_tenants(path: str) -> dict[str, list[str]]:
    try:
        found: object = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise JobFileError(f"{path}: expected the keys of a server, found: {error}") from error
    if not isinstance(found, dict):
        raise JobFileError(f"{path}: expected an object of tenants, found {type(found).__name__}")
    tenants: dict[str, list[str]] = {}
    for tenant, digests in cast("dict[str, object]", found).items():
        if not _TENANT.fullmatch(tenant):
            raise JobFileError(f"{path}: expected the name of a tenant, found {tenant!r}")
        is_list = isinstance(digests, list)
        listed = [text for text in cast("list[object]", digests) if isinstance(text, str)] if is_list else []
        if not is_list or len(listed) != len(cast("list[object]", digests)) or not all(map(_DIGEST.fullmatch, listed)):
            raise JobFileError(f"{path}: {tenant}: expected a list of SHA-256 digests in hex, found something else")
        tenants[tenant] = listed
    return tenants
