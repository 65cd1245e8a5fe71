"""vLLM's side of the `vllm` engine: a script for an interpreter that has vLLM and none of our packages.

`process.py` starts it by file path. Both sides exchange lines of JSON, over this side's standard input and output;
whatever vLLM prints goes to standard error.

    runner -> worker    {"type": "load", "engine": {arguments of vLLM's EngineArgs}, "named": {argument: who set it},
                         "batch_invariant": auto, on or off, "adapters": {name: folder}}     first and once
                        {"type": "ask", "id", "prompt_token_ids", "cache_salt", "sampling", "grammar", "is_streamed",
                         "adapter", "rank"}
                        {"type": "withdraw", "ids"}
    worker -> runner    {"type": "ready", "max_model_len", "vocab_size", "max_num_seqs", "device", "dtype",
                         "is_quantized", "is_batch_invariant", "version", "block_size", "hit_unit",
                         "num_dropped_units", "num_replayed_tokens"}
                        {"type": "broken", "error", "was_batch_invariant"}                   the last line, then exit 1
                        {"type": "tokens", "id", "token_ids", "logprobs", "top_logprobs", "cached_tokens",
                         "finish_reason"}
                        {"type": "refused", "id", "error"}

`token_ids` are those since the line before; `finish_reason` is null while more will come, and a request that is not
streamed gets one line. The end of standard input ends the worker and vLLM's own processes.
"""

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, BinaryIO

SHUTDOWN_TIMEOUT_S = 20.0
"""How long vLLM may take to end its processes before they are killed."""

MAX_ERROR_CHARACTERS = 1500
"""Of an error's text: vLLM lists every architecture it knows to say that it lacks one."""

BATCH_INVARIANT_VARIABLE = "VLLM_BATCH_INVARIANT"
CACHE_FACTS = "vllm_cache_facts.CacheFacts"
"""In `beside_vllm/`, which lies on the path of vLLM's own processes, too."""

Message = dict[str, Any]
Emit = Callable[[list[Message]], None]


def main() -> int:
    """Load the engine that the first line describes and serve requests until the lines end."""
    lines, emit = _claim_pipes()
    first = lines.readline()
    if not first:
        return 0
    inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines, inbox), daemon=True).start()
    engine: Any = None
    is_invariant = False
    try:
        load: Message = json.loads(first)
        is_invariant = choose_batch_invariance(load["batch_invariant"])
        vllm: Any = import_module("vllm")
        arguments: Any = import_module("vllm_arguments")
        arguments.check_arguments(load["engine"], load["named"])
        engine = _load_engine(vllm, load["engine"])
        emit([_describe_engine(vllm, engine, is_invariant)])
        _serve(engine, inbox, emit, _list_adapters(load["adapters"]))
    except Exception as error:  # whatever it is, the runner must hear of it
        emit([{"type": "broken", "error": _describe_error(error), "was_batch_invariant": is_invariant}])
        return 1
    finally:
        if engine is not None:
            engine.engine_core.shutdown()
    return 0


def _claim_pipes() -> tuple[BinaryIO, Emit]:
    """Keep standard input and output for the protocol, out of reach of vLLM and the processes that it starts."""
    source, sink = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    # A forked child that kept the pipe open would hide this process's exit from the runner.
    os.register_at_fork(after_in_child=lambda: (os.close(source), os.close(sink)))
    out = os.fdopen(sink, "wb")

    def emit(messages: list[Message]) -> None:
        out.write(b"".join(json.dumps(message).encode() + b"\n" for message in messages))
        out.flush()

    return os.fdopen(source, "rb"), emit


def _read(lines: BinaryIO, inbox: "queue.SimpleQueue[Message | None]") -> None:
    """Hand lines to the main thread, None at their end; then make sure that this process ends, even while it loads."""
    for line in lines:
        inbox.put(json.loads(line))
    inbox.put(None)
    threading.main_thread().join(SHUTDOWN_TIMEOUT_S)
    if threading.main_thread().is_alive():
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os._exit(1)


def choose_batch_invariance(wanted: str) -> bool:
    """Set vLLM's variable before vLLM reads it; returns whether answers will not depend on the batch.

    vLLM 0.32 has the kernels on CUDA from compute capability 8.0 on, on ROCm and on XPU. It takes the variable
    anywhere, and fails or changes nothing elsewhere.

    Raises:
        ValueError: the platform does not have it, and it must be.
    """
    os.environ[BATCH_INVARIANT_VARIABLE] = "0"
    if wanted == "off":
        return False
    platform: Any = import_module("vllm.platforms").current_platform
    has_it = platform.is_rocm() or platform.is_xpu() or (platform.is_cuda() and platform.has_device_capability(80))
    if wanted == "on" and not has_it:
        raise ValueError(
            "[model] batch_invariant: vLLM has it on CUDA from compute capability 8.0 on, on ROCm and on XPU, found "
            f"{platform.device_type}; leave it at auto"
        )
    os.environ[BATCH_INVARIANT_VARIABLE] = "1" if has_it else "0"
    return bool(has_it)


def _load_engine(vllm: Any, arguments: Message) -> Any:
    if arguments.get("distributed_executor_backend", "mp") in ("mp", "uni") and "worker_extension_cls" not in arguments:
        arguments = arguments | {"worker_extension_cls": CACHE_FACTS}
    if arguments.get("data_parallel_size", 1) > 1:
        ranked: Any = import_module("ranked_engine")
        return ranked.RankedEngine(arguments)
    return vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**arguments))


def _describe_engine(vllm: Any, engine: Any, is_invariant: bool) -> Message:
    config: Any = engine.vllm_config
    block_size = int(config.cache_config.block_size)
    try:
        unit, num_replayed = engine.collective_rpc("moebeam_cache_facts")[0]
    except Exception as error:  # other executors and platforms; the block is then the least that can be said
        print(f"the unit of the prefix cache is not known: {_describe_error(error)}", file=sys.stderr)
        unit, num_replayed = block_size, 0
    drafts: Any = config.speculative_config
    return {
        "type": "ready",
        "max_model_len": engine.model_config.max_model_len,
        "vocab_size": engine.model_config.get_vocab_size(),
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "device": import_module("vllm.platforms").current_platform.device_type,
        "dtype": str(engine.model_config.dtype).removeprefix("torch."),
        "is_quantized": engine.model_config.quantization is not None or config.cache_config.cache_dtype != "auto",
        "is_batch_invariant": is_invariant,
        "version": vllm.__version__,
        "block_size": block_size,
        "hit_unit": unit,
        # What a draft model reads ahead spoils the last unit of a match.
        "num_dropped_units": int(drafts is not None and bool(drafts.use_eagle())),
        "num_replayed_tokens": num_replayed,
    }


def _list_adapters(folders: Mapping[str, str]) -> dict[str, Any]:
    if not folders:
        return {}
    request: Any = import_module("vllm.lora.request").LoRARequest
    return {name: request(name, number, path) for number, (name, path) in enumerate(folders.items(), start=1)}


def _describe_error(error: Exception) -> str:
    """An error on one line, without what only a reader of vLLM's code can use."""
    text = " ".join(line.strip() for line in str(error).splitlines() if "errors.pydantic.dev" not in line)
    text = text if len(text) <= MAX_ERROR_CHARACTERS else f"{text[:MAX_ERROR_CHARACTERS]}..."
    return f"{type(error).__name__}: {text}"


def _serve(engine: Any, inbox: "queue.SimpleQueue[Message | None]", emit: Emit, adapters: Mapping[str, Any]) -> None:
    """Take requests as they come, before each step of the engine; wait for them only when it has nothing to do."""
    while True:
        is_idle = not engine.has_unfinished_requests()
        while is_idle or not inbox.empty():
            message = inbox.get()
            if message is None:
                return
            if message["type"] == "withdraw":
                engine.abort_request(message["ids"])
            elif (refusal := _add(engine, message, adapters)) is not None:
                emit([refusal])
            is_idle = is_idle and not engine.has_unfinished_requests()
        outputs = engine.step()
        if outputs:
            emit([_tokens(output) for output in outputs])


def _add(engine: Any, message: Message, adapters: Mapping[str, Any]) -> Message | None:
    """Give a request to the engine; what it refuses comes back as a line, and the engine goes on."""
    prompt: Message = {"prompt_token_ids": message["prompt_token_ids"]}
    if message["cache_salt"]:
        prompt["cache_salt"] = message["cache_salt"]
    options: Message = {}
    if message["adapter"] is not None:
        options["lora_request"] = adapters[message["adapter"]]
    if message["rank"] is not None:
        options["data_parallel_rank"] = message["rank"]
    dead: type[Exception] = import_module("vllm.v1.engine.exceptions").EngineDeadError
    try:
        engine.add_request(message["id"], prompt, _sampling_params(message), **options)
    except dead:
        raise
    except Exception as error:  # vLLM refuses with errors of many types, and none of them breaks the engine
        return {"type": "refused", "id": message["id"], "error": _describe_error(error)}
    return None


def _sampling_params(message: Message) -> Any:
    parameters: Any = import_module("vllm.sampling_params")
    grammar: str | None = message["grammar"]
    kinds = parameters.RequestOutputKind
    return parameters.SamplingParams(
        **message["sampling"],
        # The runner names the end tokens and makes the text.
        ignore_eos=True,
        detokenize=False,
        structured_outputs=None if grammar is None else parameters.StructuredOutputsParams(**convert_grammar(grammar)),
        output_kind=kinds.DELTA if message["is_streamed"] else kinds.FINAL_ONLY,
    )


def convert_grammar(grammar: str) -> dict[str, str]:
    """An llguidance grammar as vLLM takes it: the JSON Schema or the Lark text inside.

    vLLM 0.32 writes llguidance's own JSON itself and takes none; `x-guidance` in a schema keeps its meaning.

    Raises:
        ValueError: the grammar is not one schema or one Lark text.
    """
    match json.loads(grammar):
        case {"grammars": [{"json_schema": schema, **more}], **others} if not others and more.keys() <= {"name"}:
            return {"json": json.dumps(schema)}
        case {"grammars": [{"lark_grammar": str(lark), **more}], **others} if not others and more.keys() <= {"name"}:
            return {"grammar": lark}
        case _:
            raise ValueError(f"expected an llguidance grammar of one JSON Schema or one Lark text, found {grammar:.80}")


def _tokens(output: Any) -> Message:
    (answer,) = output.outputs
    token_ids = list(answer.token_ids)
    logprobs = answer.logprobs
    likeliest: list[list[tuple[int, float]]] | None = None
    if logprobs is not None:
        # vLLM adds the drawn token where it is none of those asked for.
        likeliest = [
            sorted(((token_id, float(found.logprob)) for token_id, found in of.items()), key=lambda pair: -pair[1])
            for of in logprobs
        ]
        logprobs = [float(of[token_id].logprob) for token_id, of in zip(token_ids, logprobs, strict=True)]
    return {
        "type": "tokens",
        "id": output.request_id,
        "token_ids": token_ids,
        "logprobs": logprobs,
        "top_logprobs": likeliest,
        "cached_tokens": output.num_cached_tokens,
        "finish_reason": answer.finish_reason,
    }


if __name__ == "__main__":
    # This file's folder holds modules of ours with common names, which vLLM must not find instead of its own.
    _folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != _folder]
    sys.path.append(os.path.join(_folder, "beside_vllm"))
    sys.exit(main())
