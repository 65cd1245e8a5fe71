"""Steps of a real schedule over a real cache, for tests of what a step reads, with rows that are known by their paths.

A *path* is a prompt's and its answer's tokens up to a row, its own included. Vectors are drawn by a hash of the path,
so that a row that reads another path's entry, or one of the right path at a wrong place, is seen.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from moebeam.model_runner.torch_engine.memory.cache import Cache, RingKind
from moebeam.model_runner.torch_engine.memory.segments import SegmentKind
from moebeam.model_runner.torch_engine.schedule.schedule import Schedule
from moebeam.model_runner.torch_engine.schedule.steps import Span, Step
from tests.support.models.checkpoint_layouts import make_prompts, random_tokens

Path = tuple[int, ...]
ReadStep = Callable[[Step, list[Path]], None]

CPU = torch.device("cpu")

_BASE = random_tokens(77, 120)
# Prompts that leave one trunk anywhere, so that many rows read its nodes; some end on it.
prompt_lists = st.lists(
    st.builds(lambda cut, tail: _BASE[:cut] + tail, st.integers(1, 120), st.lists(st.integers(0, 1), max_size=5)),
    min_size=1,
    max_size=8,
)


def make_cache(kinds: Sequence[SegmentKind] = (), rings: Sequence[RingKind] = ()) -> Cache:
    return Cache(kinds, rings, dtype=torch.float32, device=CPU, max_expanded_bytes=0)


def run_steps(prompts: Sequence[Sequence[int]], cache: Cache, read_step: ReadStep, **options: int) -> Schedule:
    """Answer prompts by tokens that a hash of the path gives, in steps each of which `read_step` sees.

    Args:
        read_step: called with a step, for whose entries there is room in `cache`, and the path of each of its rows.
        options: `max_tokens` of each prompt, and the schedule's own.
    """
    max_tokens = options.pop("max_tokens", 7)
    defaults = {"max_cache_bytes": 1 << 40, "max_running": 100, "max_step_rows": 1_000}
    schedule = Schedule(make_prompts(prompts, max_tokens), cache, **(defaults | options))
    while schedule.has_work():
        step = schedule.next_step()
        _release(schedule, cache)
        if step.num_rows:
            cache.prepare(step.spans, step.num_rows, schedule.live_spans)
            paths = [path for span in step.spans for path in _list_paths(span)]
            read_step(step, paths)
            cache.commit(step.spans)
            schedule.mark_computed(step)
        for running in step.sampled:
            path = [*running.prompt.token_ids.tolist(), *running.answer]
            schedule.append_token(running, zlib.crc32(bytes(path)) % 2, None)
        _release(schedule, cache)
    return schedule


def _release(schedule: Schedule, cache: Cache) -> None:
    for node in schedule.take_released():
        cache.close(node)


def _list_paths(span: Span) -> list[Path]:
    before = [token for node in list(span.node.path())[:0:-1] for token in node.token_ids.tolist()]
    own = [*span.node.token_ids.tolist(), *(span.running.answer if span.running is not None else [])]
    tokens = before + own
    return [tuple(tokens[: position + 1]) for position in range(span.position, span.position + span.num_rows)]


@lru_cache(maxsize=200_000)
def vector(name: str, path: Path, width: int) -> tuple[float, ...]:
    """Normal numbers that belong to a name and a path."""
    seed = zlib.crc32(name.encode() + bytes(path))
    return tuple(np.random.default_rng(seed).standard_normal(width, dtype=np.float32).tolist())


def vectors(name: str, paths: Sequence[Path], width: int) -> Tensor:
    """One `vector` a path; float32, shape (num_paths, width)."""
    return torch.tensor([vector(name, path, width) for path in paths], dtype=torch.float32).view(len(paths), width)


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of one row, by float64.

    Args:
        query: shape (num_heads, width). key: shape (num_keys, width). value: shape (num_keys, value_width).
    """
    weights = (query.double() @ key.double().t()).softmax(dim=-1)
    return (weights @ value.double()).float()
