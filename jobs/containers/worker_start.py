"""What a worker's container starts: secrets become environment variables, then Beam's boot program takes over.

A service such as Dataflow gives its containers no environment of a job's own, and a key must stand neither in an image
nor in Beam's options. So the image says where keys lie: `MOEBEAM_SECRETS` names variables and their places in Secret
Manager, and whoever the worker runs as may read them or not.
"""

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from moebeam.schemas.errors import EngineLoadError

SECRETS_VARIABLE = "MOEBEAM_SECRETS"
"""Such as `DEEPSEEK_API_KEY=projects/my-project/secrets/deepseek/versions/latest`; several are parted by spaces."""

BOOT_VARIABLE = "BEAM_BOOT"
BOOT = "/opt/apache/beam/boot"

AccessSecret = Callable[[str], str]


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Become Beam's boot program, with `args` or the command line as they came."""
    try:
        os.environ.update(secret_variables(os.environ))
    except EngineLoadError as error:
        sys.exit(f"error: {error}")
    boot = os.environ.get(BOOT_VARIABLE, BOOT)
    os.execv(boot, [boot, *(sys.argv[1:] if args is None else args)])


def secret_variables(environment: Mapping[str, str], access: AccessSecret | None = None) -> dict[str, str]:
    """The variables that `MOEBEAM_SECRETS` names, with their values; those that are set already are not read.

    Args:
        access: reads the secret of a name; else Secret Manager does.
    Raises:
        EngineLoadError: an entry is no `VARIABLE=projects/…`, or a secret cannot be read; no value is ever shown.
    """
    values: dict[str, str] = {}
    for entry in environment.get(SECRETS_VARIABLE, "").split():
        variable, _, name = entry.partition("=")
        if not variable.isidentifier() or not name.startswith("projects/"):
            raise EngineLoadError(
                f"{SECRETS_VARIABLE}: expected VARIABLE=projects/…/secrets/…/versions/…, found {variable!r} "
                "and something that names no secret"
            )
        if not environment.get(variable):
            access = access or _secret_manager()
            try:
                values[variable] = access(name)
            except Exception as error:  # the client's errors come from two libraries without a common base
                raise EngineLoadError(f"{variable}: secret {name} cannot be read: {type(error).__name__}") from error
    return values


def _secret_manager() -> AccessSecret:
    try:
        client: Any = importlib.import_module("google.cloud.secretmanager").SecretManagerServiceClient()
    except ImportError as error:
        raise EngineLoadError(f"{SECRETS_VARIABLE}: needs Google's client, install moebeam[gcp]") from error

    def access(name: str) -> str:
        return str(client.access_secret_version(name=name).payload.data.decode().strip())

    return access


if __name__ == "__main__":
    main()
