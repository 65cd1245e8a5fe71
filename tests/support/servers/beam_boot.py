"""Beam's own boot program of a Python worker container, built from the Go module proxy at the version of the SDK.

`python -m tests.support.servers.beam_boot` builds it ahead of the tests; else the first test that needs it does.
"""

import sys
from importlib.metadata import version
from pathlib import Path

from tests.support.servers.go_programs import GoProgramError, go_program

MODULE = "github.com/apache/beam/sdks/v2/python/container"


def install() -> Path:
    """The program that a container of Beam keeps as `/opt/apache/beam/boot`.

    Raises:
        GoProgramError: it cannot be built.
    """
    return go_program(MODULE, f"v{version('apache-beam')}", name="beam-boot")


if __name__ == "__main__":
    try:
        print(install())
    except GoProgramError as error:
        sys.exit(f"error: {error}")
