"""The maths of one policy update on ART's packed sequences, wherever the model computes.

A packed sequence holds several trajectories; those of one group share one copy of their prompt. Each trainer
runs its model over such sequences; what is asked of it, and what becomes of its answers, is here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from art.dev import TrainConfig as DevTrainConfig
from art.loss import loss_fn, shift_tensor
from art.preprocessing.inputs import TrainInputs, create_train_inputs
from art.preprocessing.pack import PackedTensors
from art.types import TrainConfig

from tasks.titles.errors import ConfigError, RunStopped

PADDING_GROUP = -1
"""What ART's packing writes into `group_ids` behind the last token of a sequence."""


@dataclass(frozen=True)
class Part:
    """What one packed sequence adds to an update, besides its gradient."""

    loss: float
    entropy: float
    probabilities: torch.Tensor
    """Of each sampled token, [when sampled / now, tokens]."""
    divergence: float


def check_supported(dev_config: DevTrainConfig) -> None:
    """Raise `ConfigError` for options of ART's trainer that an update of all sequences at once does not have."""
    options = cast(dict[str, Any], dev_config)
    unsupported = [key for key in ("precalculate_logprobs", "kl_ref_adapter_path") if options.get(key)]
    if unsupported:
        raise ConfigError(f"This trainer does not support ART's {', '.join(unsupported)}. Leave it unset.")


def sequence_of(
    packed: PackedTensors, number: int, config: TrainConfig, dev_config: DevTrainConfig, *, multiple: int = 1
) -> TrainInputs:
    """Return one packed sequence without the padding behind its last token, but for a length of `multiple` tokens."""
    inputs = create_train_inputs(packed, number, config, dev_config, False)
    length = int((inputs["group_ids"][0] != PADDING_GROUP).nonzero().max()) + 1
    length += -length % multiple
    cut = {
        key: value[:, :length].clone() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()
    }
    return cast(TrainInputs, cut)


def assistant_tokens(inputs: TrainInputs) -> int:
    """Return how many tokens the loss of a packed sequence is about."""
    return int(inputs["assistant_mask"][:, 1:].sum())


def attention_bias(
    group_ids: torch.Tensor, parent_ids: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return ART's packing mask as an additive one, [1, 1, tokens, tokens].

    A token sees the tokens before it of its own trajectory and of the shared prompt (the rule of
    `calculate_mask` in ART's `art/unsloth/train.py`, which cannot be imported without its GPU packages).
    """
    count = group_ids.shape[1]
    causal = torch.ones(count, count, dtype=torch.bool, device=group_ids.device).tril()
    related = (group_ids[:, :, None] == group_ids[:, None]) | (parent_ids[:, :, None] == group_ids[:, None])
    bias = torch.zeros(1, count, count, dtype=dtype, device=group_ids.device)
    return bias.masked_fill(~(causal & related), float("-inf"))[:, None]


def spoken_places(inputs: TrainInputs) -> torch.Tensor:
    """Return the places whose next token the assistant wrote, [places]: the only ones whose logits the loss needs."""
    return shift_tensor(inputs["assistant_mask"], False)[0].nonzero()[:, 0]


def place_logprobs(
    inputs: TrainInputs, places: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities and entropies, each [1, tokens], from the logits of `places`, [places, vocabulary].

    Place i of the first speaks of token i + 1, as `loss_fn` expects; of the second, place i speaks of
    token i, because `loss_fn` shifts it. All other places are 0.
    """
    tokens = inputs["tokens"][0]
    distribution = logits.log_softmax(dim=-1)
    chosen = distribution.gather(1, tokens[places + 1, None])[:, 0]
    blank = torch.zeros(len(tokens), dtype=logits.dtype, device=logits.device)
    logprobs = blank.scatter(0, places, chosen)
    with torch.no_grad():
        entropy = -(distribution.exp() * distribution).sum(dim=-1)
        entropies = blank.scatter(0, places + 1, entropy)
    return logprobs[None], entropies[None]


def part_of(
    inputs: TrainInputs,
    logprobs: torch.Tensor,
    entropies: torch.Tensor,
    reference: torch.Tensor | None,
    tokens: int,
) -> tuple[torch.Tensor, Part]:
    """Return the loss of one packed sequence, to be differentiated, and its part in the update's figures.

    `tokens` are the assistant's in the whole update; `reference` are the base model's log-probabilities, where
    there is a KL penalty. The penalty is centred within each packed sequence, as ART does it.
    """
    loss = loss_fn(inputs, logprobs, reference, entropies, inputs["_config"], reduction="sum")
    mean = loss.policy_loss / tokens
    known = ~inputs["logprobs"][0, 1:].isnan()
    divergence = loss.kl_policy_ref.item() if loss.kl_policy_ref is not None else 0.0
    return mean, Part(
        loss=mean.item(),
        entropy=cast(torch.Tensor, loss.entropy).item() / tokens,
        probabilities=torch.stack([inputs["logprobs"][0, 1:][known], logprobs.detach()[0, :-1][known]]).exp(),
        divergence=divergence * assistant_tokens(inputs) / tokens,
    )


def update_metrics(
    parts: Sequence[Part], *, norm: float, learning_rate: float, with_reference: bool
) -> dict[str, float]:
    """Return an update's metrics by ART's names.

    Raises `RunStopped` where its loss or the norm of its gradient is not finite: such an update must not be made.
    """
    loss = sum(part.loss for part in parts)
    if not (math.isfinite(norm) and math.isfinite(loss)):
        raise RunStopped(
            f"The update is not finite (loss {loss}, gradient norm {norm}) and was not made. "
            "Lower the learning rate, and resume from the last checkpoint."
        )
    metrics = {
        "loss/train": loss,
        "loss/entropy": sum(part.entropy for part in parts),
        "loss/grad_norm": norm,
        "loss/learning_rate": learning_rate,
    }
    probabilities = torch.cat([part.probabilities for part in parts], dim=1)
    correlation = torch.corrcoef(probabilities)[0, 1].item() if probabilities.shape[1] > 1 else math.nan
    if math.isfinite(correlation):  # undefined where all probabilities are alike
        metrics["probs_corr"] = correlation
    if with_reference:
        metrics["loss/kl_policy_ref"] = sum(part.divergence for part in parts)
    return metrics
