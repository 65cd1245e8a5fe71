"""The threads of an engine's steps: times them, asks the policy, and sets torch's number.

torch's own number at the time of loading is the most: it follows `OMP_NUM_THREADS`, `torch.set_num_threads` and the
process's affinity.
"""

import math
import os
import time
from collections.abc import Generator
from contextlib import contextmanager

import psutil
import torch

from moebeam.model_runner.torch_engine.counters import EngineCounters
from moebeam.model_runner.torch_engine.threads.limits import count_usable_cores
from moebeam.model_runner.torch_engine.threads.policy import StepTiming, ThreadPolicy

_READING_S = 0.5
"""How often load and limits are read; the clocks of the load tick every 10 ms."""


class StepThreads:
    """How many threads the steps of one engine run on; on an accelerator always as many as torch has.

    Attributes:
        policy: decides between steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._most = torch.get_num_threads()
        self._is_on_cpu = device.type == "cpu"
        self._max_threads = min(self._most, count_usable_cores()) if self._is_on_cpu else self._most
        self.policy = ThreadPolicy(self._max_threads)
        self._load = _MachineLoad()
        self._started_s = self._started_cpu_s = 0.0

    @property
    def num_mask_threads(self) -> int | None:
        """How many threads may fill grammars' masks beside a step; None leaves it to llguidance."""
        return max(1, self._max_threads * 4 // 5) if self._is_on_cpu else None

    @contextmanager
    def use(self) -> Generator[None]:
        """Let torch use the chosen number of threads inside the block."""
        with _num_threads(self.policy.num_threads):
            yield

    def start(self) -> None:
        """Start the clocks of a step."""
        self._started_s, self._started_cpu_s = time.perf_counter(), time.process_time()

    def exclude(self, seconds: float) -> None:
        """Leave out time in which the step waited for something else than its threads."""
        self._started_s += seconds

    def end(self, num_rows: int, *, has_prompts: bool, has_masks: bool, counters: EngineCounters) -> None:
        """Count a step's time since `start`, and choose the threads of the next.

        Args:
            num_rows: rows of the step; steps whose numbers are within a tenth or so are compared.
            has_prompts: whether some are of prompts, which read more of what came before them.
            has_masks: whether other threads filled masks meanwhile.
        """
        now_s = time.perf_counter()
        wall_s, num_threads = now_s - self._started_s, self.policy.num_threads
        # A new mapping: another thread may be copying the counters.
        seconds = counters.seconds_by_threads
        counters.seconds_by_threads = {**seconds, num_threads: seconds.get(num_threads, 0.0) + wall_s}
        if not self._is_on_cpu or self._most == 1:
            return
        taken_cores: float | None = None
        if (free_cores := self._load.read_free_cores(now_s)) is not None:
            self._max_threads = min(self._most, count_usable_cores())
            taken_cores = max(0.0, self._max_threads - free_cores)
        kind = (round(4 * math.log2(max(1, num_rows))), has_prompts, has_masks)
        cpu_s = time.process_time() - self._started_cpu_s
        num_changes = self.policy.num_changes
        self.policy.observe(StepTiming(kind, wall_s, cpu_s, now_s, self._max_threads, taken_cores))
        counters.num_thread_changes += self.policy.num_changes - num_changes


class _MachineLoad:
    """Measures how many cores other programs leave free; a hypervisor that takes cores away counts as one."""

    def __init__(self) -> None:
        self._read_s = -math.inf
        self._free_s = 0.0

    def read_free_cores(self, now_s: float) -> float | None:
        """Cores that were idle or ours since the last reading; None for the first, or if that is too short ago."""
        elapsed_s = now_s - self._read_s
        if elapsed_s < _READING_S:
            return None
        machine, own = psutil.cpu_times(), os.times()
        free_s = machine.idle + getattr(machine, "iowait", 0.0) + own.user + own.system
        before_s, self._free_s, self._read_s = self._free_s, free_s, now_s
        return None if math.isinf(elapsed_s) else (free_s - before_s) / elapsed_s


@contextmanager
def _num_threads(num: int) -> Generator[None]:
    before = torch.get_num_threads()
    if before == num:
        yield
        return
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)
