"""The arguments of vLLM's engine: what the job says, what answers depend on, and what the machine needs."""

import json
import os
from collections.abc import Mapping
from typing import cast

from moebeam.model_runner.protocol import EngineConfig
from moebeam.model_runner.vllm_engine.options import VllmOptions
from moebeam.schemas.canonical import Json
from moebeam.schemas.errors import EngineLoadError

ARGUMENTS_VARIABLE = "MOEBEAM_VLLM_ARGS"


def build_engine_arguments(config: EngineConfig, model_config: Mapping[str, Json]) -> dict[str, Json]:
    """The arguments of `vllm.EngineArgs`: the job's, ours, and the machine's from `MOEBEAM_VLLM_ARGS`.

    Args:
        model_config: the checkpoint's `config.json`.
    Raises:
        EngineLoadError: the variable holds no JSON object, or an argument that is set here.
    """
    options = config.options_as(VllmOptions)
    dtype = options.dtype
    if dtype == "auto":
        stated = model_config.get("dtype", model_config.get("torch_dtype"))
        # vLLM's own `auto` makes bfloat16 of a float32 checkpoint.
        dtype = "float32" if stated == "float32" else "auto"
    arguments: dict[str, Json] = {
        "model": config.path,
        "dtype": dtype,
        "enable_prefix_caching": True,
        # A checkpoint's own temperature or penalties must not leak in.
        "generation_config": "vllm",
        "structured_outputs_config": {"backend": "guidance"},
        "trust_remote_code": False,
        "disable_log_stats": True,
    }
    if options.batch_size:
        arguments["max_num_seqs"] = options.batch_size
    if options.max_model_len:
        arguments["max_model_len"] = options.max_model_len
    try:
        more: object = json.loads(os.environ.get(ARGUMENTS_VARIABLE) or "{}")
    except ValueError as error:
        raise EngineLoadError(f"{ARGUMENTS_VARIABLE}: expected a JSON object, found: {error}") from error
    if not isinstance(more, dict):
        raise EngineLoadError(f"{ARGUMENTS_VARIABLE}: expected a JSON object, found {type(more).__name__}")
    if taken := more.keys() & arguments.keys():
        raise EngineLoadError(f"{ARGUMENTS_VARIABLE}: {', '.join(sorted(taken))} cannot be set here")
    return arguments | cast("dict[str, Json]", more)
