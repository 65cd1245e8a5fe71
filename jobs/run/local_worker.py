"""What a local worker process starts: its output goes to a log file, then Beam's worker takes over.

`python -P -m moebeam.jobs.run.local_worker FOLDER`, started by Beam's local runner as `local_runner.py` tells it.
Without `-P` a module in the working directory could stand in place of any that the worker imports.
"""

import logging
import os
import runpy
import sys
from pathlib import Path

from moebeam.schemas.redaction.guard_logs import HidingStream, guard_logs

BEAM_WORKER = "apache_beam.runners.worker.sdk_worker_main"


def main() -> None:
    """Become Beam's worker, as if it had been started itself."""
    keep_output(Path(sys.argv.pop(1)))
    runpy.run_module(BEAM_WORKER, run_name="__main__", alter_sys=True)


def keep_output(folder: Path) -> None:
    """Send all that this process prints or logs to a file of its own; what it logs reaches the launcher, too."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"worker-{os.getpid()}.log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    log = HidingStream(os.fdopen(os.dup(2), "a", encoding="utf-8", errors="backslashreplace"))
    sys.stdout = sys.stderr = log
    handler = logging.StreamHandler(log)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    guard_logs()


if __name__ == "__main__":
    main()
