"""The torch engine, from token ids to token ids. A step is plan -> extend -> sample -> retire.

    plan    `schedule/`  which prompts run, and which of their tokens go through the model now
    extend  `models/`    the forward pass, over the keys and states of `memory/`
    sample  `sampler.py` one token for each row with logits
    retire  `schedule/`  tokens join their answers; finished prompts leave and free their memory

`runner.py` turns requests into prompts and answers into texts.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from threading import Event, Lock

import torch
from torch import Tensor

from moebeam.model_runner.checkpoint.model_config import load_transformers_config
from moebeam.model_runner.checkpoint.prompt_limits import why_not_runnable
from moebeam.model_runner.grammar.constraint import MaskFiller
from moebeam.model_runner.torch_engine.accelerators import pick_device
from moebeam.model_runner.torch_engine.counters import EngineCounters
from moebeam.model_runner.torch_engine.loading import build_model, parse_dtype, place_weights, read_our_config
from moebeam.model_runner.torch_engine.memory.cache import Cache
from moebeam.model_runner.torch_engine.models.architecture import Architecture, extend_batches, place_step
from moebeam.model_runner.torch_engine.sampler import Draw, Drawn, sample
from moebeam.model_runner.torch_engine.schedule.prompt_tree import Node
from moebeam.model_runner.torch_engine.schedule.running import Running
from moebeam.model_runner.torch_engine.schedule.schedule import Schedule
from moebeam.model_runner.torch_engine.schedule.sequences import Finished, Prompt
from moebeam.model_runner.torch_engine.schedule.steps import Step, cut_step
from moebeam.model_runner.torch_engine.streaming.layers import StreamedLayers
from moebeam.model_runner.torch_engine.threads.step_threads import StepThreads
from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights
from moebeam.model_runner.torch_engine.weights.devices import (
    Placement,
    available_bytes,
    keep_freed_memory,
    touch_memory,
)
from moebeam.schemas.errors import EngineFailed

DEFAULT_BATCH_SIZE = 128
MAX_STEP_ROWS = 1024
"""Rows that go through a layer together; what a layer computes inside is that large."""

STREAMED_BATCH_SIZE = 4096
MAX_STREAMED_STEP_ROWS = 65_536
"""Where each step reads the weights anew, it takes all rows that there are, in parts of `MAX_STEP_ROWS`."""

MAX_LOGIT_ROWS = 512
MIN_STEP_ROWS = 64
MAX_TOUCHED_BYTES = 3 << 29
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
        max_step_rows: int = 0,
        context_length: int | None = None,
    ) -> None:
        self.model = model
        self.context_length = context_length
        self.placement = placement
        is_streamed = placement.max_weight_bytes > 0
        self.batch_size = batch_size or (STREAMED_BATCH_SIZE if is_streamed else DEFAULT_BATCH_SIZE)
        num_free_bytes = max_cache_bytes or available_bytes(placement.device) - placement.max_weight_bytes
        self.max_cache_bytes = max_cache_bytes or max(1, num_free_bytes // 3)
        self.max_step_rows = max_step_rows or MAX_STEP_ROWS
        if is_streamed and not max_step_rows:
            row_bytes = 4 * model.row_width * placement.dtype.itemsize  # rows before and after a layer, and plans
            most = self.max_cache_bytes // 4 // row_bytes
            self.max_step_rows = min(MAX_STREAMED_STEP_ROWS, max(MAX_STEP_ROWS, most))
        self.counters = EngineCounters()
        self.threads = StepThreads(placement.device)
        self.masks = MaskFiller(model.vocab_size, num_threads=self.threads.num_mask_threads)
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
        max_weight_bytes: int = 0,
        max_step_rows: int = 0,
        max_model_len: int = 0,
        keeps_page_cache: bool | None = None,
    ) -> "TorchEngine":
        """Load a checkpoint folder.

        Args:
            dtype: `float32`, `bfloat16` or `auto`, the configuration's own.
            device: `auto` or a torch device.
            batch_size: most running prompts; 0 lets the engine decide.
            max_cache_bytes: most memory for live keys and states; 0 means a third of the device's free memory.
            max_weight_bytes: most memory for weights; 0 sets no limit.
            max_step_rows: most prompt tokens in a step; 0 lets the engine decide.
            max_model_len: most tokens of prompt and answer; 0 means what the configuration implies.
            keeps_page_cache: whether files stay in the system's page cache once they were read for a step; None: if
                they take less than half of the free memory.
        Raises:
            EngineLoadError: the checkpoint cannot be read, or its model is unknown.
        """
        found = read_our_config(path, max_model_len)
        config = load_transformers_config(found)
        parsed_dtype = parse_dtype(dtype, config.dtype)
        taken = pick_device(device)
        keep_freed_memory(taken.device)
        weights = CheckpointWeights.open(path, found.model_type, parsed_dtype)
        placement = place_weights(weights, taken.device, max_weight_bytes)
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
        if isinstance(model.layers, StreamedLayers):
            if keeps_page_cache is None:
                keeps_page_cache = weights.num_bytes < available_bytes(torch.device("cpu")) // 2
            model.layers.start(bypasses_cache=not keeps_page_cache)
        else:
            touch_memory(placement.device, min(MAX_TOUCHED_BYTES, 3 * weights.num_bytes))
        return engine

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
            with self._engine.threads.use():
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
        engine, step = self._engine, self._plan()
        sampled = step.sampled
        engine.threads.start()  # not before: the plan may wait for the source of prompts
        masks = engine.masks.start([running.prompt.constraint for running in sampled])
        try:
            rows = self._extend(step) if step.num_rows else None
        finally:
            allowed = masks.result()  # after a failure too: threads are filling them
        tokens = self._sample(step, rows, allowed)
        engine.threads.end(
            step.num_rows,
            has_prompts=step.num_prompt_rows > 0,
            has_masks=allowed is not None,
            counters=engine.counters,
        )
        return self._retire(sampled, tokens)

    def _plan(self) -> Step:
        self._phase_started = time.perf_counter()
        step = self.schedule.next_step()
        self._num_step_rows = step.num_rows
        self._free_released()
        return step

    def _extend(self, step: Step) -> Tensor:
        """Run the model over a step's rows: what `read_logits` takes, of those with logits."""
        engine, cache = self._engine, self._cache
        layers, counters = engine.model.layers, engine.counters
        cache.prepare(step.spans, min(step.num_rows, MAX_STEP_ROWS), self.schedule.live_spans)
        batches = [place_step(part, engine.model, engine.placement.device) for part in cut_step(step, MAX_STEP_ROWS)]
        self._end_phase("plan")
        num_bytes_before, wait_before_s = layers.num_bytes_read, layers.wait_s
        rows = torch.cat(extend_batches(engine.model, batches, cache))
        counters.num_weight_bytes_read += layers.num_bytes_read - num_bytes_before
        counters.weight_wait_s += layers.wait_s - wait_before_s
        engine.threads.exclude(layers.wait_s - wait_before_s)
        cache.commit(step.spans)
        self.schedule.mark_computed(step)
        engine.counters.num_steps += 1
        engine.counters.num_computed_prefill_tokens += step.num_prompt_rows
        engine.counters.num_decode_tokens += step.num_rows - step.num_prompt_rows
        engine.counters.flops += engine.model.flops(step.num_rows, len(step.logit_rows))
        self._end_phase("extend")
        return rows

    def _sample(self, step: Step, rows: Tensor | None, allowed: Tensor | None) -> list[Drawn]:
        """Draw the next token of each of `step.sampled`; shared nodes keep their logits for prompts that end on them.

        Args:
            rows: that `_extend` returned.
        """
        tokens: list[Drawn] = []
        for first in range(0, len(step.logit_owners), MAX_LOGIT_ROWS):
            assert rows is not None
            owners = step.logit_owners[first : first + MAX_LOGIT_ROWS]
            logits = self._engine.model.read_logits(rows[first : first + MAX_LOGIT_ROWS])
            self._end_phase("extend")
            for row, owner in enumerate(owners):
                if isinstance(owner, Node):
                    owner.last_logits = logits[row].clone()
            drawn = [row for row, owner in enumerate(owners) if isinstance(owner, Running)]
            sampled = [owner for owner in owners if isinstance(owner, Running)]
            tokens += _draw(sampled, logits if len(drawn) == len(owners) else logits[drawn], allowed, len(tokens))
            self._end_phase("sample")
        for first in range(0, len(step.full_hits), MAX_LOGIT_ROWS):
            sampled = step.full_hits[first : first + MAX_LOGIT_ROWS]
            kept = [running.node.parent.last_logits for running in sampled if running.node.parent is not None]
            tokens += _draw(sampled, torch.stack(kept), allowed, len(tokens))
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


def _draw(sampled: Sequence[Running], logits: Tensor, allowed: Tensor | None, first: int) -> list[Drawn]:
    """Draw tokens from logits, shape (num_sampled, vocab_size); their masks are in `allowed` from `first` on."""
    if not sampled:
        return []
    masks = None if allowed is None else allowed[first : first + len(sampled)]
    return sample(logits, [_make_draw(running) for running in sampled], masks)


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
