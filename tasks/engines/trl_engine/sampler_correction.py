"""What TRL corrects a loss by where sampler and trainer differ, from the update's own pass over the titles.

TRL reads all titles once more before the update, for what the trainer's log-probabilities were when the sampler wrote
them. A step makes one update here, on titles of the present policy: the update's own log-probabilities are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from trl import GRPOTrainer

LEFT_OUT = "sampling/titles_left_out"


def correct_in_the_update(trainer: GRPOTrainer) -> None:
    """Have `trainer` compute the log-probabilities of a title once a step, not twice.

    It must make one update a step, on all titles of it, and correct its loss as TRL does by default: a title's loss
    times its ratio of probabilities, and a title beyond the bound left out. The share of those is in TRL's log.
    """
    parts = cast(Any, trainer)
    bound = parts.vllm_importance_sampling_clip_max
    collect, compute_loss, logprobs = (
        parts._generate_and_score_completions,
        parts._compute_loss,
        parts._get_per_token_logps_and_entropies,
    )
    batch: dict[str, torch.Tensor] = {}
    """What the loss is being computed of."""

    def collect_uncorrected(inputs: Any) -> Any:
        parts.vllm_importance_sampling_correction = False
        try:
            return collect(inputs)
        finally:
            parts.vllm_importance_sampling_correction = True

    def compute_corrected(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        batch.update(inputs)
        try:
            return cast(torch.Tensor, compute_loss(model, batch))
        finally:
            batch.clear()

    def logprobs_and_ratio(*arguments: Any, **options: Any) -> Any:
        found = logprobs(*arguments, **options)
        if batch:
            ratio = title_ratios(found[0].detach(), batch["sampling_per_token_logps"], batch["completion_mask"])
            left_out = ratio > bound
            batch["importance_sampling_ratio"] = ratio.masked_fill(left_out, 0)
            share = parts.accelerator.gather(left_out.float()).mean().item()
            parts._metrics["train"][LEFT_OUT].append(share)
        return found

    parts._generate_and_score_completions = collect_uncorrected
    parts._compute_loss = compute_corrected
    parts._get_per_token_logps_and_entropies = logprobs_and_ratio


def title_ratios(trained: torch.Tensor, sampled: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return p(title) of the trainer over that of the sampler, [titles, 1], from log-probabilities [titles, tokens].

    A token that the sampler gives no number for (NaN) counts as one on which both agree.
    """
    differences = torch.nan_to_num((trained - sampled) * mask, nan=0.0)
    return differences.sum(dim=-1, keepdim=True).exp()
