"""What happens around each of TRL's updates: checkpoint, weight sync, canary, validation and commit."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer

from tasks.engines.adapter_files import save_training
from tasks.engines.checkpoints import write_checkpoint
from tasks.engines.contract import TrainingRequest
from tasks.engines.ledger import Ledger, validation_rows
from tasks.engines.resume import checkpoints_folder
from tasks.engines.stopwatch import Stopwatch
from tasks.engines.training_state import TrainingState
from tasks.engines.trl_engine.arguments import optimizer_settings
from tasks.engines.trl_engine.reward import TitleRewards, groups_of
from tasks.engines.trl_engine.sampler import CpuGeneration, watch
from tasks.engines.trl_engine.seeds import TitleSeeds
from tasks.titles import metric_names as names
from tasks.titles.cursor import sampling_seed
from tasks.titles.errors import NothingToTrainOn
from tasks.titles.rollout import RolloutGroup, check_failures
from tasks.titles.rollout_metrics import tokens_of, train_metrics, trainable, val_metrics, why_nothing
from tasks.titles.story import Prompt

logger = logging.getLogger(__name__)

# TRL's names of what it measures, and this project's.
TRAINER_METRICS = {
    "loss": names.TRAIN_LOSS,
    "entropy": names.TRAIN_ENTROPY,
    "grad_norm": names.TRAIN_GRAD_NORM,
    "kl": names.TRAIN_KL,
}


class StepCallback(TrainerCallback):
    """Turns TRL's log of an update into a committed step of the run.

    Every process of a training has one. They exchange their titles and go through the same states; the main one
    writes.
    """

    def __init__(
        self,
        request: TrainingRequest,
        ledger: Ledger,
        rewards: TitleRewards,
        seeds: TitleSeeds,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._request, self._profile = request, request.profile
        self._ledger, self._rewards, self._seeds, self._optimizer = ledger, rewards, seeds, optimizer
        self._state = ledger.state
        self._after: TrainingState = self._state
        self._empty: list[RolloutGroup] = []
        """Groups of the last steps in a row that had nothing to train on."""
        self._empty_steps = 0
        self._begun = 0.0
        self._watch = Stopwatch()
        self._save = self._watch.timed("save", self._write_checkpoint)

    def attach(self, trainer: GRPOTrainer) -> None:
        """Watch the sampler of `trainer`; must come before it trains."""
        self._trainer = trainer
        self._canary = watch(trainer, self._profile.canary_tolerance)
        generation: Any = trainer.vllm_generation
        generation.generate = self._watch.timed("write", generation.generate)
        generation.sync_weights = self._watch.timed("sync", generation.sync_weights)
        vllm = getattr(generation, "llm", None)
        if vllm is not None:  # in this process
            vllm.sleep = self._watch.timed("sleep", vllm.sleep, apart=True)
            vllm.wake_up = self._watch.timed("sleep", vllm.wake_up, apart=True)

    def start(self) -> None:
        """Validate the untrained adapter and commit it as checkpoint 0."""
        self._save(0)
        self._sync()
        rows, metrics = self._validate(0)
        self._commit(self._state, metrics, rows)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say which titles come next, and seed what else of TRL is random: how it deals titles to micro-batches."""
        self._begun = time.monotonic()
        self._watch.seconds.clear()
        before = self._state.cursor
        prompts, cursor = before.next_batch(self._request.train, self._profile.groups_per_step)
        self._after = replace(self._state, cursor=cursor.stepped())
        self._seeds.set_step(before, prompts)
        rank = self._trainer.accelerator.process_index
        torch.manual_seed(sampling_seed(self._profile.seed, before.epoch, before.step, "micro-batches", rank))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Commit the update that TRL tells of, validated where that is due."""
        if not logs or "loss" not in logs:
            return  # the summary at the end of a sitting
        step = self._after.cursor.step
        self._save(step)
        self._sync()
        seconds = time.monotonic() - self._begun
        judged = self._rewards.take()
        groups = groups_of(judged.rows)
        failed = check_failures(groups, self._profile.max_failed_share)
        self._watch_for_empty_steps(groups)
        after = replace(self._after, trajectories_dropped=self._state.trajectories_dropped + failed)
        metrics = train_metrics(groups) | {
            own: logs[theirs] for theirs, own in TRAINER_METRICS.items() if theirs in logs
        }
        rollout = self._watch.seconds["write"] + judged.seconds
        metrics |= {
            names.TRAIN_EMPTY_BATCHES: float(not trainable(groups)),
            names.TIME_ROLLOUT: rollout,
            names.TIME_JUDGE: judged.seconds,
            names.TIME_TRAIN: seconds - rollout - sum(self._watch.seconds[part] for part in ("save", "sync", "sleep")),
            names.TIME_SAVE: self._watch.seconds["save"],
            names.TIME_SYNC: self._watch.seconds["sync"],
            names.TIME_SLEEP: self._watch.seconds["sleep"],
            names.TIME_STEP: seconds,
            names.THROUGHPUT_TOKENS: tokens_of(groups) / seconds,
        }
        # Each process has a canary of its own: with vLLM in the process each has its own sampler.
        canaries: list[dict[str, float]] = gather_object([self._canary.metrics])
        metrics |= {name: max(canary[name] for canary in canaries) for name in canaries[0]}
        if judged.neither is not None:
            metrics[names.VERDICT_NEITHER] = judged.neither
        titles: list[dict[str, Any]] = []
        if self._profile.validates(step):
            titles, validation = self._validate(step)
            metrics |= validation
        self._commit(after, metrics, titles, groups)

    def _sync(self) -> None:
        """Give the sampler the adapter as it is now; the canary runs with it."""
        self._trainer.vllm_generation.sync_weights()
        # TRL would sync once more before it generates.
        self._trainer._last_loaded_step = self._trainer.state.global_step

    def _write_checkpoint(self, step: int) -> None:
        if self._trainer.accelerator.is_main_process:
            model = self._trainer.accelerator.unwrap_model(self._trainer.model)
            with write_checkpoint(checkpoints_folder(self._request.run_dir, "trl"), step) as folder:
                save_training(model, self._optimizer, folder, optimizer_settings(self._profile))

    def _commit(
        self,
        state: TrainingState,
        metrics: dict[str, float],
        titles: Sequence[dict[str, Any]],
        groups: Sequence[RolloutGroup] = (),
    ) -> None:
        self._state = state
        if self._trainer.accelerator.is_main_process:
            self._ledger.commit(state, metrics, titles, groups)
            self._ledger.prune()
            self._state = self._ledger.state  # which knows the best step, too
        self._trainer.accelerator.wait_for_everyone()

    def _validate(self, step: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Write a title per validation story with the present weights; return them as rows, and the metrics."""
        started = time.monotonic()
        accelerator, stories = self._trainer.accelerator, self._request.val
        # Each process takes an equal share: vLLM's server mode cuts the answers by it.
        share = math.ceil(len(stories) / accelerator.num_processes)
        first = accelerator.process_index * share
        own = [stories[min(place, len(stories) - 1)] for place in range(first, first + share)]
        written = self._write(own)[: max(0, len(stories) - first)]
        tokenizer: Any = self._trainer.processing_class
        items = [
            (prompt, tokenizer.decode(tokens, skip_special_tokens=True), len(tokens))
            for prompt, tokens in zip(own, written, strict=False)
        ]
        outcomes = self._rewards.judge(items)
        rows = [(prompt, outcome) for (prompt, _, _), outcome in zip(items, outcomes, strict=True)]
        groups = groups_of(gather_object(rows))
        check_failures(groups, self._profile.max_failed_share)
        metrics = val_metrics(groups) | {names.TIME_EVAL: time.monotonic() - started}
        return validation_rows(groups, step), metrics

    def _write(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the tokens of one sampled title per prompt."""
        generation = self._trainer.vllm_generation
        ids = [list(self._seeds.prompt_ids(prompt)) for prompt in prompts]
        if isinstance(generation, CpuGeneration):
            seeds = [self._seeds.validation_seed(prompt) for prompt in prompts]
            return [completion.tokens for completion in generation.sample(ids, seeds)]
        # vLLM takes no seed for each title through TRL: here two checkpoints differ by the luck of the draw as well.
        return generation.generate(prompts=ids, images=None, num_generations=1)[1]  # type: ignore[no-any-return]

    def _watch_for_empty_steps(self, groups: Sequence[RolloutGroup]) -> None:
        """Stop a training whose groups have had no spread of rewards for `max_empty_batches` steps in a row."""
        if trainable(groups):
            self._empty, self._empty_steps = [], 0
            return
        self._empty += groups
        self._empty_steps += 1
        logger.warning(
            "No group of this step's %d has a spread of rewards: the update had nothing to learn", len(groups)
        )
        if self._empty_steps == self._profile.max_empty_batches:
            raise NothingToTrainOn(why_nothing(self._empty, self._empty_steps))
