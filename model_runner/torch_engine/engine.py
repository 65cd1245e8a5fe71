"""The torch engine, from token ids to token ids. A step is plan -> extend -> sample -> retire.

    plan    `schedule/`  which prompts run, and which of their tokens go through the model now
    extend  `models/`    the forward pass, over the keys and states of `memory/`
    sample  `sampler.py` one token for each row with logits
    retire  `schedule/`  tokens join their answers; finished prompts leave and free their memory

`runner.py` turns requests into prompts and answers into texts.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from threading import Event, Lock

import numpy as np
import torch
from torch import Tensor

from moebeam.model_runner.checkpoint.model_config import load_transformers_config
from moebeam.model_runner.checkpoint.prompt_limits import why_not_runnable
from moebeam.model_runner.grammar.constraint import MaskFiller
from moebeam.model_runner.torch_engine.accelerators import pick_device
from moebeam.model_runner.torch_engine.counters import EngineCounters
from moebeam.model_runner.torch_engine.loading import build_model, parse_dtype, read_our_config
from moebeam.model_runner.torch_engine.memory.cache import Cache
from moebeam.model_runner.torch_engine.models.architecture import Architecture, place_step
from moebeam.model_runner.torch_engine.sampler import Draw, Drawn, sample
from moebeam.model_runner.torch_engine.schedule.prompt_tree import Node
from moebeam.model_runner.torch_engine.schedule.running import Running
from moebeam.model_runner.torch_engine.schedule.schedule import Schedule
from moebeam.model_runner.torch_engine.schedule.sequences import Finished, Prompt
from moebeam.model_runner.torch_engine.schedule.steps import Step
from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights
from moebeam.model_runner.torch_engine.weights.devices import (
    Placement,
    available_bytes,
    keep_freed_memory,
    num_threads,
    touch_memory,
)
from moebeam.schemas.errors import EngineFailed
from moebeam.schemas.records import Sampling

DEFAULT_BATCH_SIZE = 128
MAX_STEP_ROWS = 1024
MIN_STEP_ROWS = 64
NUM_PROBES = 64
MAX_TOUCHED_BYTES = 3 << 29
NUM_PROBED_TOKENS = 4
_LOGGER = logging.getLogger(__name__)


class TorchEngine:
    """A loaded model that answers prompts of a planned prefix tree.

    Attributes:
        claim: lock that keeps other engines of this host from the device while the engine lives.
    """

    def __init__(
        self,
        model: Architecture,
        placement: Placement,
        *,
        batch_size: int = 0,
        max_cache_bytes: int = 0,
        max_step_rows: int = MAX_STEP_ROWS,
        context_length: int | None = None,
    ) -> None:
        self.model = model
        self.context_length = context_length
        self.placement = placement
        self.batch_size = batch_size or DEFAULT_BATCH_SIZE
        self.max_cache_bytes = max_cache_bytes or available_bytes(placement.device) // 3
        self.max_step_rows = max_step_rows
        self.counters = EngineCounters()
        self.num_threads = torch.get_num_threads()
        self.masks = MaskFiller(model.vocab_size)
        self.claim: object = None
        self._turn = Lock()
        self._is_stopped = Event()

    @classmethod
    def load(
        cls,
        path: str,
        *,
        dtype: str = "float32",
        device: str = "auto",
        batch_size: int = 0,
        max_cache_bytes: int = 0,
        max_step_rows: int = MAX_STEP_ROWS,
        max_model_len: int = 0,
    ) -> "TorchEngine":
        """Load a checkpoint folder.

        Args:
            dtype: `float32`, `bfloat16` or `auto`, the configuration's own.
            device: `auto` or a torch device.
            batch_size: most running prompts; 0 lets the engine decide.
            max_cache_bytes: most memory for live keys and states; 0 means a third of the device's free memory.
            max_step_rows: most prompt tokens in a step.
            max_model_len: most tokens of prompt and answer; 0 means what the configuration implies.
        Raises:
            EngineLoadError: the checkpoint cannot be read, or its model is unknown.
        """
        found = read_our_config(path, max_model_len)
        config = load_transformers_config(found)
        parsed_dtype = parse_dtype(dtype, config.dtype)
        taken = pick_device(device)
        placement = Placement(taken.device, parsed_dtype)
        keep_freed_memory(placement.device)
        weights = CheckpointWeights.open(path, found.model_type, parsed_dtype)
        model = build_model(config, weights, placement, path)
        engine = cls(
            model,
            placement,
            context_length=found.context_length,
            batch_size=batch_size,
            max_cache_bytes=max_cache_bytes,
            max_step_rows=max_step_rows,
        )
        engine.claim = taken.claim
        touch_memory(placement.device, min(MAX_TOUCHED_BYTES, 3 * weights.num_bytes))
        engine.calibrate()
        return engine

    def calibrate(self) -> None:
        """Measure whether a step is faster on all of torch's threads or on one.

        Synchronising threads after each of a small model's short operations costs more than they save: with the
        demo's model on two shared cores a step took 240 ms on both and 69 ms on one.
        """
        all_threads = torch.get_num_threads()
        if self.placement.device.type != "cpu" or all_threads == 1:
            return
        seconds: dict[int, float] = {}
        for num in (1, all_threads, 1, all_threads):
            self.num_threads = num
            started = time.perf_counter()
            for _ in self.run(_make_probes(min(self.batch_size, NUM_PROBES), self.model.vocab_size)):
                pass
            seconds[num] = min(seconds.get(num, math.inf), time.perf_counter() - started)
        self.num_threads = min(seconds, key=seconds.__getitem__)
        self.counters = EngineCounters()

    def run(self, prompts: Iterable[Prompt]) -> Iterator[Finished]:
        """Answer prompts; yields exactly one `Finished` for each, as soon as it is done.

        A prompt that cannot run, or fails, is finished with its error; the others go on. Runs may overlap, on threads
        or one inside another: their steps take turns, and each has its own cache. `stop` ends them early.
        """
        refused: list[Finished] = []
        run = _Run(self, self._drop_unrunnable(prompts, refused))
        try:
            while not self._is_stopped.is_set() and run.schedule.has_work():
                yield from _drain(refused)
                with self._turn:
                    finished = run.step()
                yield from run.schedule.take_passed()
                yield from finished
            yield from _drain(refused)
        finally:
            run.add_to_counters()

    def stop(self) -> None:
        """End all runs after the step that is being computed, and for good; prompts that are not done are dropped."""
        self._is_stopped.set()

    def new_cache(self) -> Cache:
        """Make an empty cache for one run."""
        return Cache(
            self.model.kinds,
            self.model.rings,
            dtype=self.placement.dtype,
            device=self.placement.device,
            max_expanded_bytes=self.max_cache_bytes // 2,
        )

    def _drop_unrunnable(self, prompts: Iterable[Prompt], refused: list[Finished]) -> Iterator[Prompt]:
        """Yield the prompts that can run; append the others to `refused`, each with its error."""
        for prompt in prompts:
            error = why_not_runnable(
                prompt.token_ids,
                prompt.max_tokens,
                vocab_size=self.model.vocab_size,
                context_length=self.context_length,
            )
            if error is None:
                yield prompt
            else:
                now = time.time()
                refused.append(Finished(prompt.prompt_id, [], "error", admitted_s=now, finished_s=now, error=error))


class _Run:
    """One call of `TorchEngine.run`: its schedule and its cache."""

    def __init__(self, engine: TorchEngine, prompts: Iterable[Prompt]) -> None:
        self._engine = engine
        self._cache = engine.new_cache()
        self._num_step_rows = 0
        self._phase_started = 0.0
        self.schedule = Schedule(
            prompts,
            self._cache,
            max_cache_bytes=engine.max_cache_bytes,
            max_running=engine.batch_size,
            max_step_rows=engine.max_step_rows,
            find_length_class=engine.model.find_length_class,
        )

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """Take one step and return the prompts that it finished; if it fails, preempt all and halve the batch."""
        try:
            with num_threads(self._engine.num_threads):
                return self._step()
        except RuntimeError as error:  # torch's out-of-memory errors are among them
            failure = EngineFailed(f"the model failed: {type(error).__name__}: {error}")
        # Outside of the handler: the error's frames hold the step's tensors until it is dropped.
        return self._recover(failure)

    def add_to_counters(self) -> None:
        """Add what this run did to the engine's counters."""
        counters, schedule, cache = self._engine.counters, self.schedule, self._cache
        counters.num_prompts += schedule.num_planned - schedule.num_passed
        counters.num_prompt_tokens += schedule.num_prompt_tokens - schedule.num_passed_tokens
        counters.num_tree_tokens += schedule.num_tree_tokens
        counters.num_preemptions += schedule.num_preemptions
        counters.num_uncomputed_answer_tokens += schedule.num_uncomputed_answer_tokens
        counters.peak_live_bytes = max(counters.peak_live_bytes, schedule.peak_bytes)
        counters.peak_cache_bytes = max(counters.peak_cache_bytes, cache.peak_bytes)
        counters.peak_expanded_bytes = max(counters.peak_expanded_bytes, cache.peak_expanded_bytes)

    def _step(self) -> list[Finished]:
        step = self._plan()
        sampled = step.sampled
        masks = self._engine.masks.start([running.prompt.constraint for running in sampled])
        try:
            logits = self._extend(step) if step.num_rows else None
        finally:
            allowed = masks.result()  # after a failure too: threads are filling them
        tokens = self._sample(step, sampled, logits, allowed)
        return self._retire(sampled, tokens)

    def _plan(self) -> Step:
        self._phase_started = time.perf_counter()
        step = self.schedule.next_step()
        self._num_step_rows = step.num_rows
        self._free_released()
        return step

    def _extend(self, step: Step) -> Tensor:
        """Run the model over a step's rows: float32 logits, shape (num_logit_rows, vocab_size)."""
        engine, cache = self._engine, self._cache
        cache.prepare(step.spans, step.num_rows, self.schedule.live_spans)
        batch = place_step(step, engine.model, engine.placement.device)
        self._end_phase("plan")
        logits = engine.model.extend(batch, cache)
        cache.commit(step.spans)
        self.schedule.mark_computed(step)
        engine.counters.num_steps += 1
        engine.counters.num_computed_prefill_tokens += step.num_prompt_rows
        engine.counters.num_decode_tokens += step.num_rows - step.num_prompt_rows
        engine.counters.flops += engine.model.flops(step.num_rows, len(step.logit_rows))
        self._end_phase("extend")
        return logits

    def _sample(
        self, step: Step, sampled: Sequence[Running], logits: Tensor | None, allowed: Tensor | None
    ) -> list[Drawn]:
        """Draw the next token of each of `sampled`; shared nodes keep their logits for the prompts that end on them."""
        if not sampled and not step.logit_owners:
            return []
        rows: list[Tensor] = []
        if logits is not None:
            for row, owner in enumerate(step.logit_owners):
                if isinstance(owner, Node):
                    owner.last_logits = logits[row].clone()
            sampled_rows = [row for row, owner in enumerate(step.logit_owners) if isinstance(owner, Running)]
            rows.append(logits if len(sampled_rows) == logits.shape[0] else logits[sampled_rows])
        for running in step.full_hits:
            assert running.node.parent is not None
            rows.append(running.node.parent.last_logits.unsqueeze(0))
        tokens: list[Drawn] = []
        if sampled:
            draws = [_make_draw(running) for running in sampled]
            tokens = sample(rows[0] if len(rows) == 1 else torch.cat(rows), draws, allowed)
        self._end_phase("sample")
        return tokens

    def _retire(self, sampled: Sequence[Running], tokens: Sequence[Drawn]) -> list[Finished]:
        finished: list[Finished] = []
        for running, token in zip(sampled, tokens, strict=True):
            done = _accept_token(self.schedule, running, token)
            if done is not None:
                finished.append(done)
        self._free_released()
        self._end_phase("retire")
        return finished

    def _recover(self, failure: EngineFailed) -> list[Finished]:
        """Preempt all and go on with half as many prompts; one that fails alone in small steps ends with the error."""
        schedule, most = self.schedule, self._engine.max_step_rows
        self._engine.counters.num_failed_steps += 1
        _LOGGER.warning("a step of %d rows failed and is done again in halves: %s", self._num_step_rows, failure)
        is_small = self._num_step_rows <= MIN_STEP_ROWS
        culprit = schedule.running[0] if schedule.num_running == 1 and is_small else None
        schedule.max_running = max(1, schedule.num_running // 2)
        schedule.max_step_rows = min(most, max(MIN_STEP_ROWS, schedule.max_step_rows // 2))
        finished: list[Finished] = []
        if culprit is not None:
            finished.append(schedule.fail(culprit, failure))
            schedule.max_running, schedule.max_step_rows = self._engine.batch_size, most
        for node in schedule.preempt_all():
            node.memory = None
        self._cache = self._engine.new_cache()
        schedule.costs = self._cache
        return finished

    def _free_released(self) -> None:
        for node in self.schedule.take_released():
            self._cache.close(node)

    def _end_phase(self, phase: str) -> None:
        """Count the seconds since the last phase ended as those of `phase`."""
        now = time.perf_counter()
        self._engine.counters.seconds[phase] += now - self._phase_started
        self._phase_started = now


def _drain(refused: list[Finished]) -> Iterator[Finished]:
    while refused:
        yield refused.pop(0)


def _make_probes(num_prompts: int, vocab_size: int) -> Iterator[Prompt]:
    """Yield prompts of one token each, for a few steps of many rows."""
    for i in range(min(num_prompts, vocab_size)):
        yield Prompt(str(i), np.array([i], dtype=np.int32), NUM_PROBED_TOKENS, Sampling(NUM_PROBED_TOKENS))


def _make_draw(running: Running) -> Draw:
    sampling = running.prompt.sampling
    return Draw(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=running.prompt.seed,
        position=len(running.answer),
        wants_logprob=sampling.logprobs,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        counts=Counter(running.answer) if sampling.has_penalty else {},
    )


def _accept_token(schedule: Schedule, running: Running, token: Drawn) -> Finished | None:
    constraint = running.prompt.constraint
    if token.is_broken and constraint is not None and constraint.failure is not None:
        return schedule.fail(running, constraint.failure)
    if token.is_broken:
        position = running.prompt.num_tokens + len(running.answer)
        message = f"the model's logits for position {position} are not numbers, or allow no token"
        return schedule.fail(running, EngineFailed(message))
    return schedule.append_token(running, token.token_id, token.logprob)
