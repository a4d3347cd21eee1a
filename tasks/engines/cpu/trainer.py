"""Trains a LoRA adapter with PEFT from ART's packed tensors, with ART's own loss."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from art.dev import TrainConfig as DevTrainConfig
from art.metrics_taxonomy import TRAIN_GRADIENT_STEPS_KEY
from art.preprocessing.inputs import TrainInputs
from art.preprocessing.pack import PackedTensors
from art.types import TrainConfig
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from tasks.engines.adapter_files import load_training, save_training, trained_weights
from tasks.engines.cpu.cores import Cores
from tasks.engines.cpu.settings import CpuSettings
from tasks.engines.packed_update import (
    Part,
    assistant_tokens,
    attention_bias,
    check_supported,
    part_of,
    place_logprobs,
    sequence_of,
    spoken_places,
    update_metrics,
)

logger = logging.getLogger(__name__)


class Trainer:
    """A base model in float32 with a trainable adapter and its optimiser."""

    def __init__(self, base: PreTrainedModel, settings: CpuSettings, cores: Cores) -> None:
        self._settings = settings
        self._cores = cores
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self._model = cast(
                PeftModel,
                get_peft_model(
                    base,
                    LoraConfig(
                        r=settings.lora_rank,
                        lora_alpha=settings.lora_alpha,
                        target_modules="all-linear",
                        task_type="CAUSAL_LM",
                    ),
                ),
            )
        # No dropout anywhere: the trainer's log-probabilities are to be the sampler's.
        self._model.eval()
        self._trained = trained_weights(self._model)
        # The learning rate comes with each call of `train`.
        self._optimizer = torch.optim.AdamW(
            list(self._trained.values()), lr=0.0, betas=settings.betas, weight_decay=settings.weight_decay
        )

    def save(self, folder: Path) -> None:
        """Write adapter (PEFT's form) and optimiser state into `folder`; nothing is pickled."""
        facts = {"name": "AdamW", "betas": list(self._settings.betas), "weight_decay": self._settings.weight_decay}
        save_training(self._model, self._optimizer, folder, facts)

    def load(self, folder: Path) -> None:
        """Take adapter and optimiser state from a checkpoint.

        Raises `CheckpointError` where they are missing or are those of another adapter.
        """
        rank, alpha = self._settings.lora_rank, self._settings.lora_alpha
        load_training(self._model, self._optimizer, folder, lora_rank=rank, lora_alpha=alpha)

    @torch.inference_mode()
    def logprobs(self, token_ids: list[int]) -> list[float]:
        """Return log p(token | tokens before it) in nats, for every token but the first."""
        tokens = torch.tensor([token_ids])
        logits = self._model(input_ids=tokens, use_cache=False).logits[0, :-1].double()
        return logits.log_softmax(dim=-1).gather(1, tokens[0, 1:, None])[:, 0].tolist()

    def train(
        self, packed: PackedTensors, config: TrainConfig, dev_config: DevTrainConfig
    ) -> Iterator[dict[str, float]]:
        """Update the adapter from packed sequences; yield the metrics of each optimiser update.

        With `updates_per_step='one'` the gradient is that of one batch over all assistant tokens of all
        sequences. A KL penalty is centred within each packed sequence, as ART does it.
        """
        check_supported(dev_config)
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate
        sequences = list(range(packed["tokens"].shape[0]))
        updates = [sequences] if self._settings.updates_per_step == "one" else [[number] for number in sequences]
        for chosen in updates:
            metrics = self._update([sequence_of(packed, number, config, dev_config) for number in chosen])
            yield {**metrics, TRAIN_GRADIENT_STEPS_KEY: float(len(updates))}

    def _update(self, batch: list[TrainInputs]) -> dict[str, float]:
        """Make one optimiser update from `batch` and return its metrics."""
        references: list[torch.Tensor | None] = [None] * len(batch)
        if batch[0]["config"].kl_penalty_coef > 0:
            # All at once, before the losses: switching the adapter off touches the one model they share.
            with self._model.disable_adapter():
                references = list(self._cores.map(self._reference, batch))
        tokens = sum(assistant_tokens(inputs) for inputs in batch)
        parts = self._cores.map(lambda pair: self._gradients(*pair, tokens), list(zip(batch, references, strict=True)))
        # Summed in the order of the batch, so that the result does not depend on which core was faster.
        for place, weight in enumerate(self._trained.values()):
            weight.grad = torch.stack([gradients[place] for gradients, _ in parts]).sum(dim=0)
        norm = torch.nn.utils.clip_grad_norm_(list(self._trained.values()), self._settings.max_grad_norm).item()
        metrics = update_metrics(
            [part for _, part in parts],
            norm=norm,
            learning_rate=self._optimizer.param_groups[0]["lr"],
            with_reference=references[0] is not None,
        )
        self._optimizer.step()
        return metrics

    @torch.no_grad()
    def _reference(self, inputs: TrainInputs) -> torch.Tensor:
        return self._packed_logprobs(inputs)[0]

    def _gradients(
        self, inputs: TrainInputs, reference: torch.Tensor | None, tokens: int
    ) -> tuple[tuple[torch.Tensor, ...], Part]:
        """Return one packed sequence's part in the update; `tokens` are the assistant's in the whole batch."""
        loss, part = part_of(inputs, *self._packed_logprobs(inputs), reference, tokens)
        return torch.autograd.grad(loss, list(self._trained.values())), part

    def _packed_logprobs(self, inputs: TrainInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities and entropies of one packed sequence, as `place_logprobs` does."""
        places = spoken_places(inputs)
        logits = self._model(
            input_ids=inputs["tokens"],
            attention_mask=attention_bias(inputs["group_ids"], inputs["parent_ids"]),
            position_ids=inputs["input_pos"],
            logits_to_keep=places,
            use_cache=False,
        ).logits[0]
        return place_logprobs(inputs, places, logits)
