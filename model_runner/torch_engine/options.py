"""The options of the engine `torch` in `[model]`."""

from typing import ClassVar

from pydantic import Field

from moebeam.schemas.job.model import CheckpointSection


class TorchOptions(CheckpointSection):
    """`engine = "torch"`: our own engine, in process, on any torch accelerator; the default."""

    loader: ClassVar[str] = "moebeam.model_runner.torch_engine.runner:load_torch_runner"
    extra: ClassVar[str] = "torch"
    is_constrained: ClassVar[bool] = True

    engine: str = "torch"
    max_cache_bytes: int = Field(
        default=0, ge=0, description="Most memory for live keys and states; 0 lets the device decide"
    )
