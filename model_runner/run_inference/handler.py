"""Any engine as a standard Beam `ModelHandler`, for use with plain `RunInference`.

Our pipeline does not use it: when one row fails, `RunInference` sends the whole batch to the dead-letter output, while
an engine returns an answer or a typed failure for every row.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from apache_beam.ml.inference.base import ModelHandler

from moebeam.model_runner.checkpoint.model_store import local_checkpoint
from moebeam.model_runner.protocol import EngineConfig, ModelRunner, load_runner
from moebeam.schemas.errors import EngineContractError
from moebeam.schemas.records import Completion, Request


class LoadedEngine:
    """A loaded engine as Beam shares it: weakly referenced in one process, or behind a proxy to another.

    A proxy cannot return an iterator, so requests and completions are lists.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def answer(self, requests: Sequence[Request]) -> list[Completion]:
        """Return one completion per request, in order; request ids need not be unique.

        Raises:
            EngineContractError: the engine left a request unanswered or answered one twice.
        """
        # A request keeps the random numbers of its own id, wherever in a batch Beam puts it.
        rekeyed = [
            dataclasses.replace(request, request_id=str(i), row_id=request.row_id or request.request_id)
            for i, request in enumerate(requests)
        ]
        answers: list[Completion | None] = [None] * len(requests)
        for completion in self._runner.generate(rekeyed):
            position = int(completion.request_id)
            if answers[position] is not None:
                raise EngineContractError(f"the engine answered request {requests[position].request_id!r} twice")
            answers[position] = dataclasses.replace(completion, request_id=requests[position].request_id)
        found = [answer for answer in answers if answer is not None]
        if len(found) != len(requests):
            raise EngineContractError(f"the engine answered {len(found)} of {len(requests)} requests")
        return found


class MoebeamModelHandler(ModelHandler[Request, Completion, LoadedEngine]):
    """Runs an engine behind `RunInference`, alone or inside a `KeyedModelHandler`.

    Completions are in the order of the batch's requests; a failed request has `Completion.error` set.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        min_batch_size: int = 1,
        max_batch_size: int = 256,
        share_across_processes: bool = False,
    ) -> None:
        """
        Args:
            config: engine and checkpoint.
            min_batch_size: fewest requests in a batch from Beam, if it has that many.
            max_batch_size: most requests in a batch from Beam; `config.batch_size` is the engine's own.
            share_across_processes: share one model among all processes of a worker.
        """
        super().__init__(
            min_batch_size=min_batch_size, max_batch_size=max_batch_size, large_model=share_across_processes
        )
        self._config = config

    def load_model(self) -> LoadedEngine:
        """Load the engine.

        Raises:
            EngineLoadError: the engine or its model cannot be loaded, or the checkpoint has another revision.
        """
        config = self._config
        if config.options.has_weights:
            config = dataclasses.replace(config, path=local_checkpoint(config.path, config.revision))
        return LoadedEngine(load_runner(config))

    def run_inference(
        self, batch: Sequence[Request], model: LoadedEngine, inference_args: Mapping[str, Any] | None = None
    ) -> list[Completion]:
        """Answer a batch. Sampling parameters come from each request's `sampling`, so arguments are refused.

        Raises:
            ValueError: there are inference arguments.
        """
        self.validate_inference_args(dict(inference_args or {}))
        return model.answer(batch)

    def validate_inference_args(self, inference_args: dict[str, Any] | None) -> None:
        """
        Raises:
            ValueError: there are inference arguments.
        """
        if inference_args:
            raise ValueError(
                f"expected no inference_args, found {', '.join(sorted(inference_args))}: set `Request.sampling` instead"
            )

    def get_num_bytes(self, batch: Sequence[Request]) -> int:
        """Count the bytes of a batch's token ids and message texts."""
        num_token_bytes = sum(int(request.prompt_token_ids.nbytes) for request in batch)
        texts = (message.content for request in batch for message in request.messages)
        return num_token_bytes + sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)

    def get_metrics_namespace(self) -> str:
        """The namespace of `RunInference`'s metrics."""
        return "moebeam"
