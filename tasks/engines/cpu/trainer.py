"""Trains a LoRA adapter with PEFT from ART's packed tensors, with ART's own loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from art.dev import TrainConfig as DevTrainConfig
from art.loss import loss_fn, shift_tensor
from art.metrics_taxonomy import TRAIN_GRADIENT_STEPS_KEY
from art.preprocessing.inputs import TrainInputs, create_train_inputs
from art.preprocessing.pack import PackedTensors
from art.types import TrainConfig
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from tasks.engines.adapter_files import load_training, save_training, trained_weights
from tasks.engines.cpu.cores import Cores
from tasks.engines.cpu.settings import CpuSettings
from tasks.titles.errors import ConfigError, RunStopped

logger = logging.getLogger(__name__)

PADDING_GROUP = -1
"""What ART's packing writes into `group_ids` behind the last token of a sequence."""


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
        _check_supported(dev_config)
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate
        sequences = list(range(packed["tokens"].shape[0]))
        updates = [sequences] if self._settings.updates_per_step == "one" else [[number] for number in sequences]
        for chosen in updates:
            metrics = self._update([_sequence(packed, number, config, dev_config) for number in chosen])
            yield {**metrics, TRAIN_GRADIENT_STEPS_KEY: float(len(updates))}

    def _update(self, batch: list[TrainInputs]) -> dict[str, float]:
        """Make one optimiser update from `batch` and return its metrics."""
        references: list[torch.Tensor | None] = [None] * len(batch)
        if batch[0]["config"].kl_penalty_coef > 0:
            # All at once, before the losses: switching the adapter off touches the one model they share.
            with self._model.disable_adapter():
                references = list(self._cores.map(self._reference, batch))
        tokens = sum(_assistant_tokens(inputs) for inputs in batch)
        parts = self._cores.map(lambda pair: self._gradients(*pair, tokens), list(zip(batch, references, strict=True)))
        # Summed in the order of the batch, so that the result does not depend on which core was faster.
        for place, weight in enumerate(self._trained.values()):
            weight.grad = torch.stack([part.gradients[place] for part in parts]).sum(dim=0)
        norm = torch.nn.utils.clip_grad_norm_(list(self._trained.values()), self._settings.max_grad_norm).item()
        loss = sum(part.loss for part in parts)
        if not (math.isfinite(norm) and math.isfinite(loss)):
            raise RunStopped(
                f"The update is not finite (loss {loss}, gradient norm {norm}) and was not made. "
                "Lower the learning rate, and resume from the last checkpoint."
            )
        self._optimizer.step()
        metrics = {
            "loss/train": loss,
            "loss/entropy": sum(part.entropy for part in parts),
            "loss/grad_norm": norm,
            "loss/learning_rate": self._optimizer.param_groups[0]["lr"],
        }
        probabilities = torch.cat([part.probabilities for part in parts], dim=1)
        correlation = torch.corrcoef(probabilities)[0, 1].item() if probabilities.shape[1] > 1 else math.nan
        if math.isfinite(correlation):  # undefined where all probabilities are alike
            metrics["probs_corr"] = correlation
        if references[0] is not None:
            metrics["loss/kl_policy_ref"] = sum(part.divergence for part in parts)
        return metrics

    @torch.no_grad()
    def _reference(self, inputs: TrainInputs) -> torch.Tensor:
        return self._packed_logprobs(inputs)[0]

    def _gradients(self, inputs: TrainInputs, reference: torch.Tensor | None, tokens: int) -> _Part:
        """Return one packed sequence's part in the update; `tokens` are the assistant's in the whole batch."""
        logprobs, entropies = self._packed_logprobs(inputs)
        loss = loss_fn(inputs, logprobs, reference, entropies, inputs["_config"], reduction="sum")
        mean = loss.policy_loss / tokens
        known = ~inputs["logprobs"][0, 1:].isnan()
        divergence = loss.kl_policy_ref.item() if loss.kl_policy_ref is not None else 0.0
        return _Part(
            gradients=torch.autograd.grad(mean, list(self._trained.values())),
            loss=mean.item(),
            entropy=cast(torch.Tensor, loss.entropy).item() / tokens,
            probabilities=torch.stack([inputs["logprobs"][0, 1:][known], logprobs.detach()[0, :-1][known]]).exp(),
            divergence=divergence * _assistant_tokens(inputs) / tokens,
        )

    def _packed_logprobs(self, inputs: TrainInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities and entropies, each [1, tokens], of one packed sequence.

        Place i of the first speaks of token i + 1, as `loss_fn` expects; of the second, place i speaks of
        token i, because `loss_fn` shifts it. Places whose token no assistant wrote are 0: logits are
        computed only where the loss looks.
        """
        tokens = inputs["tokens"]
        places = shift_tensor(inputs["assistant_mask"], False)[0].nonzero()[:, 0]
        logits = self._model(
            input_ids=tokens,
            attention_mask=attention_bias(inputs["group_ids"], inputs["parent_ids"]),
            position_ids=inputs["input_pos"],
            logits_to_keep=places,
            use_cache=False,
        ).logits[0]
        distribution = logits.log_softmax(dim=-1)
        chosen = distribution.gather(1, tokens[0, places + 1, None])[:, 0]
        logprobs = torch.zeros(tokens.shape[1]).scatter(0, places, chosen)
        with torch.no_grad():
            entropy = -(distribution.exp() * distribution).sum(dim=-1)
            entropies = torch.zeros(tokens.shape[1]).scatter(0, places + 1, entropy)
        return logprobs[None], entropies[None]


@dataclass(frozen=True)
class _Part:
    """What one packed sequence adds to an update."""

    gradients: tuple[torch.Tensor, ...]
    loss: float
    entropy: float
    probabilities: torch.Tensor
    """Of each sampled token, [when sampled / now, tokens]."""
    divergence: float


def _assistant_tokens(inputs: TrainInputs) -> int:
    return int(inputs["assistant_mask"][:, 1:].sum())


def attention_bias(group_ids: torch.Tensor, parent_ids: torch.Tensor) -> torch.Tensor:
    """Return ART's packing mask as an additive one, [1, 1, tokens, tokens].

    A token sees the tokens before it of its own trajectory and of the shared prompt (the rule of
    `calculate_mask` in ART's `art/unsloth/train.py`, which cannot be imported without its GPU packages).
    """
    count = group_ids.shape[1]
    causal = torch.ones(count, count, dtype=torch.bool).tril()
    related = (group_ids[:, :, None] == group_ids[:, None]) | (parent_ids[:, :, None] == group_ids[:, None])
    return torch.zeros(1, count, count).masked_fill(~(causal & related), float("-inf"))[:, None]


def _sequence(packed: PackedTensors, number: int, config: TrainConfig, dev_config: DevTrainConfig) -> TrainInputs:
    """Return one packed sequence without the padding behind its last token."""
    inputs = create_train_inputs(packed, number, config, dev_config, False)
    length = int((inputs["group_ids"][0] != PADDING_GROUP).nonzero().max()) + 1
    cut = {
        key: value[:, :length].clone() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()
    }
    return cast(TrainInputs, cut)


def _check_supported(dev_config: DevTrainConfig) -> None:
    """Raise `ConfigError` for options of ART's trainer that this one does not have."""
    options = cast(dict[str, Any], dev_config)
    unsupported = [key for key in ("precalculate_logprobs", "kl_ref_adapter_path") if options.get(key)]
    if unsupported:
        raise ConfigError(f"The CPU service does not support ART's {', '.join(unsupported)}. Leave it unset.")
