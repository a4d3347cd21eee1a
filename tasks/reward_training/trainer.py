"""Trains a classifier with one output and a LoRA adapter on stories, with Hugging Face's Trainer."""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from reward_server.encoding import padding_id, readable_length
from reward_server.scorer import silence_transformers
from tasks.reward_training.checkpoints import mark_complete, newest_complete
from tasks.reward_training.encoded import EncodedStories, collate, encode_stories
from tasks.reward_training.model_files import write_model
from tasks.reward_training.quality import Quality, quality
from tasks.reward_training.report import TrainedRewardModel
from tasks.reward_training.stories import LabelledStories
from tasks.starter.paths import BASE_MODEL, resolve
from tasks.starter.reward_labels import errors
from tasks.titles.config import RewardTraining, export_hub_endpoint
from tasks.titles.cursor import stories_fingerprint
from tasks.titles.errors import ConfigError, DataError, RunStopped
from tasks.titles.metric_names import TRAIN_GRAD_NORM, TRAIN_LOSS
from tasks.titles.story import Split

logger = logging.getLogger(__name__)

WARMUP = 0.1
"""Share of the steps over which the learning rate rises; then it falls along a cosine to 0."""
_METRICS = {
    "loss": TRAIN_LOSS,
    "grad_norm": TRAIN_GRAD_NORM,
    "learning_rate": "train/learning_rate",
    "eval_rmse": "val/rmse",
}
"""What the Trainer logs, by its name here."""


class Listener(Protocol):
    """Hears how far a stage (`tokens`, `training`, `figures`) has come."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total`."""
        ...


class MetricsLog(Protocol):
    """Stores the metrics of a step, each (name, step) once."""

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Store `metrics`."""
        ...


def train_reward_model(
    run_dir: Path,
    model_folder: Path,
    settings: RewardTraining,
    stories: LabelledStories,
    *,
    seed: int,
    device: str,
    metrics: MetricsLog,
    on_progress: Listener,
    stop: threading.Event,
) -> TrainedRewardModel:
    """Train to the last step, from the newest complete checkpoint in `run_dir` on, and write the model.

    `stop` ends it after the present pass with `RunStopped`, as does a loss that is not finite. Raises `ConfigError`
    for a base model that cannot be loaded, `DataError` where too few stories can be encoded, and `CheckpointError`
    for a checkpoint of other stories.
    """
    silence_transformers()
    torch.manual_seed(seed)
    base = resolve(settings.base_model, BASE_MODEL)
    tokenizer, model = _load_base(base, settings, device)
    padding = padding_id(tokenizer, model.config)
    model.config.pad_token_id = padding
    model.config.use_cache = False
    max_length = readable_length(settings.max_length, tokenizer, model.config)
    encoded = _encode(tokenizer, stories, settings, max_length, on_progress)
    model = get_peft_model(
        model,
        LoraConfig(
            r=settings.lora_rank, lora_alpha=settings.lora_alpha, task_type="SEQ_CLS", target_modules="all-linear"
        ),
    )
    train = encoded["train"]
    total = total_steps(len(train), settings)
    fingerprint = stories_fingerprint(f"{story.id} {story.score}" for story in train.stories)
    checkpoints = run_dir / "checkpoints"
    follower = _Follower(checkpoints, fingerprint, total, metrics, on_progress, stop)
    report_on = {split: _first(found, settings.report_stories).by_length() for split, found in encoded.items()}
    trainer = Trainer(
        model=model,
        args=_arguments(checkpoints, settings, total, seed=seed, device=device, evaluate="val" in encoded),
        data_collator=partial(collate, padding=padding),
        train_dataset=train,
        eval_dataset=report_on.get("val"),
        compute_metrics=_rmse,
        callbacks=[follower],
    )
    trainer.remove_callback(PrinterCallback)
    newest = newest_complete(checkpoints, fingerprint)
    on_progress("training", newest.step if newest else 0, total)
    if newest is not None and newest.step >= total:
        set_peft_model_state_dict(model, load_peft_weights(str(newest.folder), device="cpu"))
    else:
        trainer.train(resume_from_checkpoint=str(newest.folder) if newest else None)
    write_model(model, tokenizer, base, model_folder)
    figures = _figures(trainer, follower, report_on, stories.train_mean)
    for split, found in figures.items():
        metrics.log_metrics(total, found.metrics(split))
    dropped = sum((part.dropped for part in encoded.values()), Counter[str]())
    return TrainedRewardModel(total, figures, train.cut, dict(dropped))


def total_steps(stories: int, settings: RewardTraining) -> int:
    """Return how many updates the settings make of so many training stories."""
    passes = math.ceil(stories / settings.batch_size)
    steps = math.ceil(settings.epochs * math.ceil(passes / settings.accumulate))
    return min(steps, settings.max_steps) if settings.max_steps else steps


def _load_base(base: str, settings: RewardTraining, device: str) -> tuple[Any, Any]:
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but PyTorch sees no CUDA device. Use --set device=cpu.")
    export_hub_endpoint()
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=1, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(
            f"reward_training.base_model: '{settings.base_model}' cannot be loaded ({type(error).__name__}: {error}). "
            "Expected 'starter', a folder with a model as safetensors, or a hub name (check the network, HF_ENDPOINT)."
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(f"reward_training.base_model: '{settings.base_model}' has a slow tokenizer only.")
    return tokenizer, model


def _encode(
    tokenizer: Any, stories: LabelledStories, settings: RewardTraining, max_length: int, on_progress: Listener
) -> dict[Split, EncodedStories]:
    chosen = {
        split: found if split == "train" else stories.sample(split, settings.report_stories)
        for split, found in stories.by_split.items()
    }
    total = sum(len(found) for found in chosen.values())
    encoded: dict[Split, EncodedStories] = {}
    for split, found in chosen.items():
        before = sum(len(chosen[other]) for other in encoded)

        def tell(done: int, before: int = before) -> None:
            on_progress("tokens", before + done, total)

        encoded[split] = encode_stories(tokenizer, found, max_length, tell)
        logger.info(
            "%s: %d stories, %d bodies cut at %d tokens, dropped: %s",
            split, len(encoded[split]), encoded[split].cut, max_length, dict(encoded[split].dropped),
        )  # fmt: skip
        if len(encoded[split]) < 2:
            raise DataError(
                f"{stories.source}: {len(encoded[split])} {split} stories could be encoded, expected at least 2. "
                f"Dropped: {dict(encoded[split].dropped)}. Raise reward_training.max_length, or give other stories."
            )
    return encoded


def _first(encoded: EncodedStories, count: int) -> EncodedStories:
    return EncodedStories(encoded.stories[:count], encoded.ids[:count])


def _arguments(
    checkpoints: Path, settings: RewardTraining, total: int, *, seed: int, device: str, evaluate: bool
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=total,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        weight_decay=0.01,
        max_grad_norm=1.0,
        # Each step's own loss: a mean over several would be another one after a kill between them.
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=settings.eval_steps,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,
        seed=seed,
        data_seed=seed,
        use_cpu=device == "cpu",
        bf16=device == "cuda",
        dataloader_pin_memory=device == "cuda",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )


def _rmse(prediction: EvalPrediction) -> dict[str, float]:
    predicted, labels = np.ravel(prediction.predictions), np.ravel(prediction.label_ids)  # type: ignore[arg-type]
    return {"rmse": errors(predicted.tolist(), labels.tolist(), 0.0)["rmse"]}


def _figures(
    trainer: Trainer, follower: _Follower, report_on: Mapping[Split, EncodedStories], train_mean: float
) -> dict[Split, Quality]:
    """Return each split's figures; the passes of all splits are one bar."""
    size = trainer.args.eval_batch_size
    follower.passes = sum(math.ceil(len(found) / size) for found in report_on.values())
    figures = {}
    for split, found in report_on.items():
        predicted = trainer.predict(found).predictions.reshape(-1).tolist()  # type: ignore[union-attr]
        figures[split] = quality(predicted, [story.score for story in found.stories], train_mean)
    return figures


class _Follower(TrainerCallback):
    """Hands on what the Trainer logs, marks its checkpoints, and stops it."""

    def __init__(
        self,
        checkpoints: Path,
        stories: str,
        total: int,
        metrics: MetricsLog,
        on_progress: Listener,
        stop: threading.Event,
    ) -> None:
        self.passes = 0
        """Forward passes that the figures take; 0 while training."""
        self._done = 0
        self._checkpoints = checkpoints
        self._stories = stories
        self._total = total
        self._metrics = metrics
        self._on_progress = on_progress
        self._stop = stop

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Repeat what was logged up to the checkpoint: the last sitting may have died before it was stored."""
        for entry in state.log_history:
            self._log(entry)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop where asked to."""
        self._check()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop where asked to, and tell how far the figures are."""
        self._check()
        if self.passes:
            self._done += 1
            self._on_progress("figures", self._done, self.passes)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        """Store what was logged; raise `RunStopped` where the loss is no number."""
        entry = state.log_history[-1]
        loss = entry.get("loss")
        if loss is not None:
            if not math.isfinite(loss):
                raise RunStopped(
                    f"The loss of step {state.global_step} is {loss}. Lower reward_training.learning_rate "
                    f"(now {args.learning_rate:g}) and start again with --fresh."
                )
            self._on_progress("training", state.global_step, self._total, f"loss {loss:.2f}")
        self._log(entry)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint: its last file is written."""
        mark_complete(self._checkpoints, state.global_step, self._stories)

    def _log(self, entry: Mapping[str, float]) -> None:
        values = {name: float(entry[key]) for key, name in _METRICS.items() if key in entry}
        if values:
            self._metrics.log_metrics(int(entry["step"]), values)

    def _check(self) -> None:
        if self._stop.is_set():
            raise RunStopped("Interrupted; the same command continues from the last checkpoint.")
