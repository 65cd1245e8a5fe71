"""The options of the engine `transformers` in `[model]`."""

from typing import ClassVar

from moebeam.schemas.job.model import CheckpointSection


class TransformersOptions(CheckpointSection):
    """`engine = "transformers"`: any Hugging Face causal LM; slow and simple."""

    loader: ClassVar[str] = "moebeam.model_runner.transformers_engine.runner:load_transformers_runner"
    extra: ClassVar[str] = "torch"
    is_constrained: ClassVar[bool] = True
    unsupported: ClassVar[frozenset[str]] = frozenset({"service_tier", "logprobs", "top_logprobs"})

    engine: str = "transformers"
