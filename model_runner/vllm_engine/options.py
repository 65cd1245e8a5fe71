"""The options of the engine `vllm` in `[model]`."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, JsonValue, model_validator

from moebeam.model_runner.checkpoint.model_config import read_model_config
from moebeam.model_runner.checkpoint.weight_files import check_weight_files
from moebeam.model_runner.vllm_engine.prefix_units import PrefixUnit, predict_unit
from moebeam.schemas.errors import EngineLoadError
from moebeam.schemas.job.model import CheckpointSection
from moebeam.schemas.store import storage

ADAPTER_CONFIG = "adapter_config.json"

HELD_ARGUMENTS: Mapping[str, str] = {
    "model": "set [model] path",
    "tokenizer": "set [model] path",
    "dtype": "set [model] dtype",
    "max_num_seqs": "set [model] batch_size",
    "max_model_len": "set [model] max_model_len",
    "block_size": "set [model] block_size",
    "tensor_parallel_size": "set [model] tensor_parallel_size",
    "data_parallel_size": "set [model] data_parallel_size",
    "enable_expert_parallel": "set [model] expert_parallel_size",
    "enable_lora": "set [model.adapters]",
    "trust_remote_code": "no code of a checkpoint is run",
    "generation_config": "a checkpoint's own sampling must not leak into answers",
    "structured_outputs_config": "grammars are written for its backend guidance",
    "enable_prefix_caching": "requests come in the order that its cache likes",
    "disable_log_stats": "the run has counters of its own",
}
"""Arguments of `vllm.EngineArgs` that no table passes through, and what to do in their place."""


class VllmOptions(CheckpointSection):
    """`engine = "vllm"`: full-size models on NVIDIA and AMD, in an interpreter of vLLM's own."""

    loader: ClassVar[str] = "moebeam.model_runner.vllm_engine.runner:load_vllm_runner"
    is_constrained: ClassVar[bool] = True
    is_self_healing: ClassVar[bool] = True
    unsupported: ClassVar[frozenset[str]] = frozenset({"service_tier"})

    engine: str = "vllm"
    tensor_parallel_size: int = Field(
        default=1, ge=1, description="Devices that each layer is spread over, as vLLM names it"
    )
    data_parallel_size: int = Field(
        default=1,
        ge=1,
        description="Copies of the attention layers, each with `tensor_parallel_size` devices and a prefix cache of "
        "its own; requests that share a prefix go to the same one",
    )
    expert_parallel_size: int = Field(
        default=1,
        ge=1,
        description="Devices that a layer's experts are spread over: 1, or all of them, "
        "`tensor_parallel_size` x `data_parallel_size`, which vLLM fixes",
    )
    batch_invariant: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Whether vLLM computes with kernels whose rounding does not depend on the batch "
        "(`VLLM_BATCH_INVARIANT=1`), so that answers repeat bit for bit. `auto`: where platform and model have them; "
        "`on` refuses to load elsewhere. The manifest says what was promised",
    )
    block_size: int = Field(
        default=0, ge=0, description="Tokens of a block of vLLM's cache; 0 lets vLLM decide. Smaller blocks hit more"
    )
    prefix_unit: int = Field(
        default=0,
        ge=0,
        description="Tokens of the shortest prefix that vLLM's cache hits, for what `moebeam estimate` expects; 0 is "
        "what checkpoint, device and `block_size` imply. A loaded vLLM tells its own",
    )
    adapters: dict[str, str] = Field(
        default={},
        description='LoRA adapters, as `[model.adapters]` with `name = "folder"` on each worker\'s disk; rows of batch '
        "files that name one in `model` get it",
    )
    adapter: str | None = Field(
        default=None, description="Name of the adapter for rows that name none; default none, the checkpoint itself"
    )
    engine_args: dict[str, JsonValue] = Field(
        default={},
        description="Further arguments of `vllm.EngineArgs`, as `[model.engine_args]`, such as "
        "`gpu_memory_utilization = 0.95`; checked against the installed vLLM when it loads",
    )

    @model_validator(mode="after")
    def _check_vllm(self) -> "VllmOptions":
        for name in self.engine_args:
            if name in HELD_ARGUMENTS:
                raise ValueError(f"engine_args: {name} cannot be set here; {HELD_ARGUMENTS[name]}")
        num_devices = self.tensor_parallel_size * self.data_parallel_size
        if self.expert_parallel_size not in (1, num_devices):
            raise ValueError(
                f"expert_parallel_size: expected 1 or tensor_parallel_size x data_parallel_size = {num_devices}, "
                f"found {self.expert_parallel_size}"
            )
        if self.adapter is not None and self.adapter not in self.adapters:
            known = ", ".join(sorted(self.adapters)) or "none"
            raise ValueError(f"adapter: expected a name of [model.adapters] ({known}), found {self.adapter!r}")
        if self.name is not None and self.name in self.adapters:
            raise ValueError(f"adapters: {self.name!r} is the name of the model itself; give the adapter another")
        return self

    @property
    def route_names(self) -> tuple[str, ...]:
        """As of `ModelSection`: the adapters."""
        return tuple(self.adapters)

    def expect_unit(self, path: str) -> PrefixUnit:
        """The unit of vLLM's prefix cache for a checkpoint folder, before vLLM is loaded."""
        if self.prefix_unit:
            return PrefixUnit(self.prefix_unit, block_size=self.block_size)
        found = read_model_config(path, self.max_model_len, checks_rope=False)
        return predict_unit(found.values, block_size=self.block_size, device=self.device)

    def check_files(self, path: str) -> None:
        """As of `ModelSection`; vLLM has a rope of its own."""
        read_model_config(path, self.max_model_len, checks_rope=False)
        check_weight_files(path, takes_old_files=True)
        for name, folder in self.adapters.items():
            if not storage.is_local(folder) or not storage.exists(storage.join(folder, ADAPTER_CONFIG)):
                raise EngineLoadError(
                    f"[model.adapters] {name}: expected a local folder with {ADAPTER_CONFIG}, found {folder!r}"
                )
