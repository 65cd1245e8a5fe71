"""The arguments of vLLM's engine: what the job says, what answers depend on, and what the machine needs."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from moebeam.model_runner.protocol import EngineConfig
from moebeam.model_runner.vllm_engine.options import ADAPTER_CONFIG, VllmOptions
from moebeam.schemas.canonical import Json
from moebeam.schemas.errors import EngineLoadError
from moebeam.schemas.store import storage

ARGUMENTS_VARIABLE = "MOEBEAM_VLLM_ARGS"
BATCH_INVARIANT_VARIABLE = "VLLM_BATCH_INVARIANT"
JOB_TABLE = "[model.engine_args]"

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM makes room for; an adapter of another rank takes the next."""


@dataclass(frozen=True, slots=True)
class EngineArguments:
    """What a vLLM is started with.

    Attributes:
        values: arguments of `vllm.EngineArgs`.
        named: who set an argument that is not moebeam's own, for messages.
        batch_invariant: as of `VllmOptions`.
        adapters: folders of LoRA adapters by name.
    """

    values: Mapping[str, Json]
    named: Mapping[str, str]
    batch_invariant: str = "off"
    adapters: Mapping[str, str] | None = None


def build_engine_arguments(config: EngineConfig, model_config: Mapping[str, Json]) -> EngineArguments:
    """The arguments of `vllm.EngineArgs`: ours, the job's, and the machine's from `MOEBEAM_VLLM_ARGS`.

    Args:
        model_config: the checkpoint's `config.json`.
    Raises:
        EngineLoadError: the variable holds no JSON object, or an argument that is set elsewhere; an adapter cannot be
            read.
    """
    options = config.options_as(VllmOptions)
    dtype = options.dtype
    if dtype == "auto":
        stated = model_config.get("dtype", model_config.get("torch_dtype"))
        # vLLM's own `auto` makes bfloat16 of a float32 checkpoint.
        dtype = "float32" if stated == "float32" else "auto"
    values: dict[str, Json] = {
        "model": config.path,
        "dtype": dtype,
        "enable_prefix_caching": True,
        # A checkpoint's own temperature or penalties must not leak in.
        "generation_config": "vllm",
        "structured_outputs_config": {"backend": "guidance"},
        "trust_remote_code": False,
        "disable_log_stats": True,
        **_list_asked(options),
    }
    table = cast("dict[str, Json]", options.engine_args)
    machine = _read_variable()
    named = {**dict.fromkeys(table, JOB_TABLE), **dict.fromkeys(machine, ARGUMENTS_VARIABLE)}
    if taken := machine.keys() & values.keys():
        raise EngineLoadError(f"{ARGUMENTS_VARIABLE}: {', '.join(sorted(taken))} cannot be set here")
    if twice := [name for name in machine.keys() & table.keys() if machine[name] != table[name]]:
        raise EngineLoadError(
            f"{ARGUMENTS_VARIABLE}: {', '.join(sorted(twice))} differ from those of {JOB_TABLE}; leave out one of them"
        )
    if options.adapters:
        values |= {"enable_lora": True, "max_loras": len(options.adapters)}
        if "max_lora_rank" not in named:
            values["max_lora_rank"] = max(_read_rank(name, path) for name, path in options.adapters.items())
    return EngineArguments(values | table | machine, named, _choose_batch_invariance(options), options.adapters)


def _choose_batch_invariance(options: VllmOptions) -> str:
    """The job's word, or vLLM's own variable where the job leaves it open."""
    if options.batch_invariant != "auto":
        return options.batch_invariant
    return {None: "auto", "": "auto", "0": "off"}.get(os.environ.get(BATCH_INVARIANT_VARIABLE), "on")


def _list_asked(options: VllmOptions) -> dict[str, Json]:
    """The options that differ from what vLLM does by itself."""
    asked: dict[str, Json] = {
        "max_num_seqs": options.batch_size or None,
        "max_model_len": options.max_model_len or None,
        "block_size": options.block_size or None,
        "tensor_parallel_size": options.tensor_parallel_size if options.tensor_parallel_size > 1 else None,
        "data_parallel_size": options.data_parallel_size if options.data_parallel_size > 1 else None,
        "enable_expert_parallel": True if options.expert_parallel_size > 1 else None,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _read_variable() -> dict[str, Json]:
    try:
        more: object = json.loads(os.environ.get(ARGUMENTS_VARIABLE) or "{}")
    except ValueError as error:
        raise EngineLoadError(f"{ARGUMENTS_VARIABLE}: expected a JSON object, found: {error}") from error
    if not isinstance(more, dict):
        raise EngineLoadError(f"{ARGUMENTS_VARIABLE}: expected a JSON object, found {type(more).__name__}")
    return cast("dict[str, Json]", more)


def _read_rank(name: str, folder: str) -> int:
    """The room that an adapter needs."""
    file = storage.join(folder, ADAPTER_CONFIG)
    try:
        found: object = json.loads(storage.read_bytes(file))
        rank = cast("dict[str, object]", found).get("r") if isinstance(found, dict) else None
    except (OSError, ValueError) as error:
        raise EngineLoadError(f"[model.adapters] {name}: {file}: expected a LoRA adapter, found: {error}") from error
    if not isinstance(rank, int) or not 0 < rank <= LORA_RANKS[-1]:
        raise EngineLoadError(
            f"[model.adapters] {name}: {file}: r: expected a rank from 1 to {LORA_RANKS[-1]}, found {rank!r}"
        )
    return next(room for room in LORA_RANKS if room >= rank)
