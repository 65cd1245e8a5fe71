"""Programs that tests run behind the fence, each as harmful as its item says."""

import ctypes
import os
import signal
from collections.abc import Callable

from moebeam.schemas.errors import EngineLoadError, InvalidMessages


def obey(source: str) -> Callable[[str], str | list[str]]:
    """A function that does what its item says, and repeats any other."""
    if source == "no program":
        raise EngineLoadError("expected a program, found none")
    if source == "endless":
        _compute()

    def run(item: str) -> str | list[str]:
        match item.split(" ", 1):
            case ["compute"]:
                _compute()
            case ["allocate"]:
                return "x" * (4 << 30)
            case ["crash"]:
                ctypes.string_at(0)
            case ["leave"]:
                os._exit(7)
            case ["raise", message]:
                raise InvalidMessages(message)
            case ["signal"]:
                os.kill(os.getppid(), signal.SIGUSR1)
                _compute()
            case ["orphan", pid_file]:
                # Named before it is written: whoever finds it, finds it whole.
                os.symlink(str(os.getpid()), pid_file)
                _compute()
            case ["environment"]:
                return sorted(os.environ)
            case ["write", path]:
                return _try_to_write(path)
            case _:
                pass
        return item

    return run


def _compute() -> None:
    """Hours of one call into C, which no handler of Python's can interrupt."""
    _ = 10 ** (10**9)


def _try_to_write(path: str) -> str:
    try:
        with open(path, "w") as file:
            file.write("x")
    except OSError as error:
        return type(error).__name__
    return "written"
