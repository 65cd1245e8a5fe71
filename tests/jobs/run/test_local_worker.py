"""What a worker process prints, and what the processes that it starts print, goes to its log file without keys."""

import subprocess
import sys
import textwrap
from pathlib import Path

KEY = "sk-planted/0123456789"


def test_a_worker_writes_to_a_log_file_of_its_own_and_nothing_to_the_screen(tmp_path: Path) -> None:
    script = f"""
        import logging, os, sys
        from pathlib import Path
        from moebeam.jobs.run.local_worker import keep_output
        from moebeam.schemas.redaction.known_secrets import learn_secret
        keep_output(Path(sys.argv[1]))
        learn_secret({KEY!r})
        print("out", {KEY!r})
        os.system("echo child")
        logging.getLogger("some").warning("logged %s", {KEY!r})
        raise ValueError({KEY!r})
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "logs")], capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", "")
    (log,) = (tmp_path / "logs").iterdir()
    said = log.read_text()
    assert log.stat().st_mode & 0o777 == 0o600
    assert [line in said for line in ("out [key]\n", "child\n", "logged [key]\n", "ValueError: [key]\n")] == [True] * 4
    assert KEY not in said
