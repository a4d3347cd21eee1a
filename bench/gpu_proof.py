"""Whether a packed update on this GPU is the update of its trajectories one by one: figures, and what each way takes.

The single way is Unsloth's own, untouched: one trajectory in each forward pass, causal attention and no mask.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from art._backend_training import build_rl_train_configs
from art.preprocessing.pack import PackedTensors
from peft import PeftModel

from tasks.engines.adapter_files import trained_weights
from tasks.engines.gpu.packed_trainer import PackedTrainer
from tasks.engines.packed_update import assistant_tokens, part_of, place_logprobs, sequence_of, spoken_places
from tasks.titles.packed_sequences import ALIGNED

DISTURBANCE = 0.02
"""A fresh adapter's B is 0, and so are A's gradients: B is disturbed for the comparison."""
Gradients = dict[str, torch.Tensor]
Logprobs = dict[tuple[int, ...], torch.Tensor]


@dataclass(frozen=True)
class Way:
    """What one way of computing an update gave and took."""

    logprobs: Logprobs
    gradients: Gradients
    seconds: float
    peak_gb: float
    """The most that PyTorch held meanwhile, weights included, in 10⁹ bytes."""


def compare(
    model: PeftModel, optimizer: torch.optim.Optimizer, shared: PackedTensors, alone: PackedTensors
) -> dict[str, Any]:
    """Compare `shared`, where groups share their prompts, with the same trajectories `alone`, one in each sequence."""
    with _disturbed(model):
        trainer = PackedTrainer(model, optimizer, max_grad_norm=1e9)
        single = _measured(model, lambda: _singly(model, alone))
        masked = _measured(model, lambda: _packed(trainer, alone))
        packed = _measured(model, lambda: _packed(trainer, shared))
        again = [_measured(model, lambda: _gradients_only(trainer, shared)) for _ in range(2)]
        with _without_checkpointing(model):
            stored = [_measured(model, lambda: _gradients_only(trainer, shared)) for _ in range(2)]
    return {
        "sequences": {"shared": shared["tokens"].shape[0], "alone": alone["tokens"].shape[0]},
        "tokens_read": {"shared": _tokens(shared), "alone": _tokens(alone)},
        "packed_against_single": _apart(packed, single),
        # The same sequences by the two attentions: how far apart rounding alone puts them.
        "rounding_alone": _apart(masked, single),
        "seconds": {
            "single_first": single.seconds,
            "packed_first": packed.seconds,
            "packed": min(one.seconds for one in again),
            "packed_without_checkpointing": min(one.seconds for one in stored),
        },
        "peak_allocated_gb": {
            "single": single.peak_gb,
            "packed": again[0].peak_gb,
            "packed_without_checkpointing": stored[0].peak_gb,
        },
    }


def _singly(model: Any, alone: PackedTensors) -> Logprobs:
    config, dev_config = build_rl_train_configs(learning_rate=0.0)
    head = model.get_output_embeddings().weight
    batch = [
        sequence_of(alone, number, config, dev_config, multiple=ALIGNED) for number in range(alone["tokens"].shape[0])
    ]
    tokens = sum(assistant_tokens(inputs) for inputs in batch)
    found: Logprobs = {}
    os.environ["UNSLOTH_RETURN_HIDDEN_STATES"] = "1"
    model.train()
    for inputs in batch:
        on_gpu: Any = {
            key: one.to(head.device) if isinstance(one, torch.Tensor) else one for key, one in inputs.items()
        }
        places = spoken_places(on_gpu)
        with torch.autocast(head.device.type, torch.bfloat16):
            hidden = model(input_ids=on_gpu["tokens"]).logits
        logits = hidden[0, places].float() @ head.float().T
        logprobs, entropies = place_logprobs(on_gpu, places, logits)
        loss, _ = part_of(on_gpu, logprobs, entropies, None, tokens)
        loss.backward()
        found |= _by_title(on_gpu, logprobs[0, places].detach())
    return found


def _packed(trainer: PackedTrainer, packed: PackedTensors) -> Logprobs:
    config, dev_config = build_rl_train_configs(learning_rate=0.0)
    found: Logprobs = {}
    for number in range(packed["tokens"].shape[0]):
        inputs = sequence_of(packed, number, config, dev_config)
        found |= _by_title(inputs, trainer.logprobs(packed, number, config))
    _gradients_only(trainer, packed)
    return found


def _gradients_only(trainer: PackedTrainer, packed: PackedTensors) -> Logprobs:
    trainer.gradients(packed, *build_rl_train_configs(learning_rate=0.0))
    return {}


def _by_title(inputs: Any, logprobs: torch.Tensor) -> Logprobs:
    """Tell the titles of a sequence apart: each has its own group id."""
    places = spoken_places(inputs).cpu() + 1
    owners, tokens = inputs["group_ids"][0].cpu()[places], inputs["tokens"][0].cpu()[places]
    return {
        tuple(tokens[owners == owner].tolist()): logprobs.cpu()[owners == owner] for owner in owners.unique().tolist()
    }


def _measured(model: PeftModel, work: Callable[[], Logprobs]) -> Way:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    logprobs = work()
    torch.cuda.synchronize()
    seconds = round(time.perf_counter() - started, 3)
    peak_gb = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    gradients = {}
    for name, weight in trained_weights(model).items():
        if weight.grad is not None:
            gradients[name], weight.grad = weight.grad.detach().clone(), None
    return Way(logprobs, gradients, seconds, peak_gb)


def _apart(one: Way, other: Way) -> dict[str, float]:
    if one.logprobs.keys() != other.logprobs.keys() or one.gradients.keys() != other.gradients.keys():
        raise RuntimeError(
            f"Not the same titles or weights: {len(one.logprobs)}, {len(other.logprobs)}; "
            f"{len(one.gradients)}, {len(other.gradients)}"
        )
    differences = torch.cat([(one.logprobs[title] - other.logprobs[title]).abs() for title in one.logprobs])
    mine, theirs = (
        torch.cat([way.gradients[name].flatten().float() for name in one.gradients]) for way in (one, other)
    )
    by_weight = [
        _cosine(one.gradients[name].flatten().float(), gradient.flatten().float())
        for name, gradient in other.gradients.items()
    ]
    return {
        "tokens": float(len(differences)),
        "logprob_max": round(float(differences.max()), 5),
        "logprob_mean": round(float(differences.mean()), 6),
        "gradient_cosine": round(_cosine(mine, theirs), 6),
        "gradient_norm_ratio": round(float(mine.norm() / theirs.norm()), 5),
        "worst_weight_cosine": round(min(by_weight), 5),
    }


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def _tokens(packed: PackedTensors) -> int:
    return int((packed["group_ids"] != -1).sum())


class _disturbed:
    def __init__(self, model: PeftModel) -> None:
        self._weights = {name: weight for name, weight in trained_weights(model).items() if "lora_B" in name}

    @torch.no_grad()
    def __enter__(self) -> None:
        self._before = {name: weight.detach().clone() for name, weight in self._weights.items()}
        generator = torch.Generator().manual_seed(5)
        for weight in self._weights.values():
            weight.add_((DISTURBANCE * torch.randn(weight.shape, generator=generator)).to(weight))

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for name, weight in self._weights.items():
            weight.copy_(self._before[name])


class _without_checkpointing:
    def __init__(self, model: PeftModel) -> None:
        self._on = [one for one in model.modules() if getattr(one, "gradient_checkpointing", False)]

    def __enter__(self) -> None:
        for module in self._on:
            module.gradient_checkpointing = False  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        for module in self._on:
            module.gradient_checkpointing = True  # type: ignore[assignment]
