"""Several data parallel ranks of vLLM, driven like one engine."""

import asyncio
import queue
import threading
from importlib import import_module
from typing import Any

STEP_S = 0.05
"""How long the ranks are waited for before requests are taken again."""

Message = dict[str, Any]


class RankedEngine:
    """vLLM's asynchronous engine behind the calls of its `LLMEngine`, which drives only one data parallel rank."""

    def __init__(self, arguments: Message) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._outputs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._waiting: dict[str, asyncio.Task[None]] = {}
        self._engine: Any = self._call(self._start(arguments))
        self.vllm_config: Any = self._engine.vllm_config
        self.model_config: Any = self._engine.model_config
        self.engine_core = self

    async def _start(self, arguments: Message) -> Any:
        engine_args: Any = import_module("vllm.engine.arg_utils").AsyncEngineArgs
        engine: Any = import_module("vllm.v1.engine.async_llm").AsyncLLM
        return engine.from_engine_args(engine_args(**arguments))

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def collective_rpc(self, method: str) -> Any:
        return self._call(self._engine.collective_rpc(method))

    def has_unfinished_requests(self) -> bool:
        return bool(self._waiting) or not self._outputs.empty()

    def add_request(self, request_id: str, prompt: Message, params: Any, **options: Any) -> None:
        self._call(self._add(request_id, prompt, params, options))

    async def _add(self, request_id: str, prompt: Message, params: Any, options: Message) -> None:
        found = await self._engine.add_request(request_id, prompt, params, **options)
        self._waiting[request_id] = asyncio.create_task(self._collect(request_id, found))

    async def _collect(self, request_id: str, found: Any) -> None:
        try:
            while True:
                output = found.get_nowait() or await found.get()
                if output.finished:
                    self._waiting.pop(request_id, None)
                self._outputs.put(output)
                if output.finished:
                    return
        except Exception as error:  # raised where the engine is served
            self._waiting.pop(request_id, None)
            self._outputs.put(error)

    def abort_request(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            if (task := self._waiting.pop(request_id, None)) is not None:
                self._loop.call_soon_threadsafe(task.cancel)
        self._call(self._engine.abort(request_ids))

    def step(self) -> list[Any]:
        """What has come since the last call, after a moment's wait for the first."""
        outputs: list[Any] = []
        try:
            outputs.append(self._outputs.get(timeout=STEP_S))
            while True:
                outputs.append(self._outputs.get_nowait())
        except queue.Empty:
            pass
        for output in outputs:
            if isinstance(output, Exception):
                raise output
        return outputs

    def shutdown(self) -> None:
        self._engine.shutdown()
