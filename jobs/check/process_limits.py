"""Whether the system lets a run start its threads: libraries that cannot start one abort the process or wait on."""

import threading

from moebeam.schemas.errors import PipelineFailed

NUM_THREADS = 10
"""Threads that a run on one worker starts beyond those of the command."""


def check_process_limits(num_threads: int = NUM_THREADS) -> None:
    """Start so many threads and end them again.

    Raises:
        PipelineFailed: fewer can be started; says how many, and which limits there are.
    """
    ended, threads = threading.Event(), list[threading.Thread]()
    try:
        for _ in range(num_threads):
            thread = threading.Thread(target=ended.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except (RuntimeError, MemoryError) as error:
        raise PipelineFailed(
            f"expected to be allowed {num_threads} more threads, found {len(threads)}: {error or 'no memory is left'}; "
            "raise the limit of processes (ulimit -u), of address space (ulimit -v) or of the container (pids)"
        ) from error
    finally:
        ended.set()
        for thread in threads:
            thread.join()
