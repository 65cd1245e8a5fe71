"""The options of the engine `torch` in `[model]`."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from moebeam.model_runner.checkpoint.model_config import check_limits, read_model_config
from moebeam.model_runner.checkpoint.weight_files import check_weight_files
from moebeam.schemas.job.model import CheckpointSection


class TorchOptions(CheckpointSection):
    """`engine = "torch"`: our own engine, in process, on any torch accelerator; the default."""

    loader: ClassVar[str] = "moebeam.model_runner.torch_engine.runner:load_torch_runner"
    checker: ClassVar[str] = "moebeam.model_runner.torch_engine.loading:check_torch_checkpoint"
    extra: ClassVar[str] = "torch"
    is_constrained: ClassVar[bool] = True
    plans_prefixes: ClassVar[bool] = True

    engine: str = "torch"
    max_cache_bytes: int = Field(
        default=0, ge=0, description="Most memory for live keys and states; 0 lets the device decide"
    )
    max_weight_bytes: int = Field(
        default=0,
        ge=0,
        description="Most memory for weights. Layers of a checkpoint that is larger are read from disk in every step, "
        "while the layer before computes; `batch_size` 0 then runs as many sequences as `max_cache_bytes` holds. "
        "0 keeps all weights in memory",
    )

    @classmethod
    def choose_library_environment(cls, environment: Mapping[str, str]) -> dict[str, str]:
        """As of `ModelSection`.

        Threads that wait for each other spin for about 0.1 ms, then sleep. Those that sleep at once lose a quarter of a
        quiet machine, and those that spin as long as libgomp would half of a busy one (`docs/adr/0014`).
        """
        if environment.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
            return {}
        return {"GOMP_SPINCOUNT": "10000"}

    def check_files(self, path: str) -> None:
        """As of `ModelSection`."""
        check_limits(read_model_config(path, self.max_model_len))
        check_weight_files(path, takes_old_files=False)
