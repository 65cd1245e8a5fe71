"""Stands in for Beam's worker: prints more than a pipe holds, says who it is, and waits for its end."""

import os
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    print("x" * 200_000, end="", flush=True)
    Path(tempfile.gettempdir(), "started").write_text(os.environ["WORKER_ID"])
    time.sleep(60)
