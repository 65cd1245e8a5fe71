"""Checkpoints larger than the memory for weights: the same answers, from weights read layer by layer."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from moebeam.model_runner.torch_engine import engine as engine_module
from moebeam.model_runner.torch_engine import loading
from moebeam.model_runner.torch_engine.engine import TorchEngine
from moebeam.model_runner.torch_engine.streaming.layers import StreamedLayers
from moebeam.schemas.errors import EngineFailed, EngineLoadError
from tests.support.models.checkpoint_layouts import LAYOUTS, OpenLayout, greedy, load_engine, random_tokens

PROMPTS = [*(random_tokens(1, 40) + random_tokens(i, 1 + i) for i in range(4)), random_tokens(1, 40), [7], [7, 8]]
NUM_TOKENS = 4


def find_least(path: Path, **options: Any) -> int:
    """The least `max_weight_bytes` that works, as the error says it."""
    with pytest.raises(EngineLoadError, match="max_weight_bytes: expected at least") as found:
        load_engine(path, max_weight_bytes=1, **options)
    return int(str(found.value).split("at least ")[1].split(" ")[0].replace(",", ""))


def streamed(path: Path, max_weight_bytes: int, **options: Any) -> TorchEngine:
    engine = load_engine(path, max_weight_bytes=max_weight_bytes, **options)
    assert isinstance(engine.model.layers, StreamedLayers)
    return engine


@pytest.fixture(autouse=True)
def _nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole pages of tiny experts take more than the checkpoint."""
    monkeypatch.setattr(loading, "count_converted_bytes", lambda *_: 1 << 40)


@pytest.fixture(autouse=True)
def _no_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def recover(run: Any, failure: EngineFailed) -> Any:
        raise AssertionError(str(failure))

    monkeypatch.setattr(engine_module._Run, "_recover", recover)


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_every_architecture_answers_the_same_from_streamed_weights(
    open_layout: OpenLayout, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    layout = open_layout(name)
    expected = greedy(layout.engine(), PROMPTS, NUM_TOKENS)
    monkeypatch.setattr(engine_module, "MAX_STEP_ROWS", 9)  # parts of a step, which cut spans
    engine = streamed(layout.path, find_least(layout.path), max_step_rows=60)
    assert greedy(engine, PROMPTS, NUM_TOKENS) == expected
    assert engine.counters.num_weight_bytes_read > 0


@pytest.mark.parametrize("num_more_bytes", [0, 100_000, 10_000_000])
def test_any_memory_for_weights_gives_the_same_answers(open_layout: OpenLayout, num_more_bytes: int) -> None:
    layout = open_layout("v4")
    expected = greedy(layout.engine(), PROMPTS, NUM_TOKENS)
    engine = streamed(layout.path, find_least(layout.path) + num_more_bytes)
    assert greedy(engine, PROMPTS, NUM_TOKENS) == expected
    num_bytes_before = engine.counters.num_weight_bytes_read
    assert greedy(engine, PROMPTS, NUM_TOKENS) == expected
    is_all_pinned = num_more_bytes == 10_000_000
    assert (engine.counters.num_weight_bytes_read == num_bytes_before) == is_all_pinned


def test_files_are_read_the_same_with_and_without_the_page_cache(open_layout: OpenLayout) -> None:
    layout = open_layout("v3")
    expected = greedy(layout.engine(), PROMPTS, NUM_TOKENS)
    for keeps_page_cache in (True, False):
        engine = streamed(layout.path, find_least(layout.path), keeps_page_cache=keeps_page_cache)
        assert greedy(engine, PROMPTS, NUM_TOKENS) == expected


def test_a_single_row_reads_only_the_experts_that_it_chose(open_layout: OpenLayout) -> None:
    layout = open_layout("v3")
    few, many = (streamed(layout.path, find_least(layout.path)) for _ in range(2))
    greedy(few, [[7]], 1)
    greedy(many, [random_tokens(3, 60)], 1)
    assert 0 < few.counters.num_weight_bytes_read < many.counters.num_weight_bytes_read


def test_weights_of_another_dtype_are_streamed_as_stored(open_layout: OpenLayout) -> None:
    layout = open_layout("mixtral")
    loaded = load_engine(layout.path, dtype="bfloat16")
    engine = streamed(layout.path, find_least(layout.path, dtype="bfloat16"), dtype="bfloat16")
    assert engine.placement.dtype == loaded.placement.dtype
    assert len(greedy(engine, PROMPTS, NUM_TOKENS)) == len(PROMPTS)


def test_a_file_that_was_cut_after_loading_is_an_error_and_no_hang(open_layout: OpenLayout, tmp_path: Path) -> None:
    path = Path(shutil.copytree(open_layout("v3").path, tmp_path / "copy"))
    engine = streamed(path, find_least(path))
    file = path / "model.safetensors"
    (tmp_path / "cut").write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (tmp_path / "cut").replace(file)
    with pytest.raises(EngineLoadError, match="the file has changed since the model was loaded"):
        greedy(engine, PROMPTS, NUM_TOKENS)
