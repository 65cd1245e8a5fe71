"""What `benchmarks.pipeline` lets run: the whole way of moebeam, and what it is held against.

A module a contender, so that none pays for what another imports. Each has `run(files, output, checkpoint) -> int`: it
reads the same Parquet file, writes into a folder of its own, and returns how many rows came out. `ray_data` is a
script instead, because Ray may live in another environment.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Literal, TypeAlias, cast, get_args

from benchmarks.pipeline.prompts import BenchmarkFiles

Name: TypeAlias = Literal["whole_way", "plain_loop", "bare_beam", "group_batches"]
NAMES: tuple[Name, ...] = get_args(Name)

Contender: TypeAlias = Callable[[BenchmarkFiles, Path, str], int]
"""(files, output folder that is not there yet, checkpoint folder) -> rows that came out."""


def load_contender(name: Name) -> Contender:
    """Import one contender."""
    return cast("Contender", import_module(f"benchmarks.pipeline.contenders.{name}").run)
