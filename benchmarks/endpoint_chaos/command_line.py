"""moebeam's command line where names may be unknown: the file named in the environment says when.

Name servers cannot be broken for one process from outside. Addresses written in numbers are found all the same.
"""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAME_UNKNOWN_VARIABLE = "MOEBEAM_CHAOS_NAME_UNKNOWN"


def _failing_while(path: Path, look_up: Callable[..., Any]) -> Callable[..., Any]:
    def find_address(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host is not None and path.exists():
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return look_up(host, *args, **kwargs)

    return find_address


def main() -> None:
    """Run the command line of `sys.argv`."""
    from moebeam.jobs.commands.cli import main as run

    socket.getaddrinfo = _failing_while(Path(os.environ[NAME_UNKNOWN_VARIABLE]), socket.getaddrinfo)
    run()


if __name__ == "__main__":
    main()
