"""ART's Unsloth service with three additions: its trainer can be asked, keeps its precision, and its optimiser is kept.

It runs in the process that ART moves it to, where `art` must be imported before everything that Unsloth rewrites.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from art.local.checkpoints import get_last_checkpoint_dir
from art.unsloth.service import UnslothService
from art.unsloth.train import UnslothTrainContext, calculate_attn_bias
from art.utils.get_model_step import get_step_from_dir
from art.utils.output_dirs import get_step_checkpoint_dir

# isort: split
import torch

from tasks.engines.adapter_files import load_optimizer, save_optimizer
from tasks.engines.gpu.failures import TellsFailures

PRECISION = ("forward", "_original_forward")
"""The attributes by which accelerate makes a model compute in bfloat16 and answer in float32."""
ALIGNED = 64
"""Attention kernels want masks whose rows begin at round addresses."""


class GpuService(UnslothService):
    """Unsloth's trainer, and vLLM's server as a child."""

    async def train(self, *arguments: Any, **options: Any) -> AsyncIterator[dict[str, float]]:
        """Train as ART does, and put the optimiser's state beside the adapter of the new checkpoint."""
        wrapper: dict[str, Any] = {}
        async for result in super().train(*arguments, **options):
            attributes = vars(self._state.trainer.model)
            wrapper = {name: attributes[name] for name in PRECISION if name in attributes}
            yield result
        # ART takes accelerate's wrapper off to save the adapter, and nobody puts it back: from the second step on the
        # log-probabilities would be bfloat16, whose steps are 0.03 nats wide between 4 and 8.
        vars(self._state.trainer.model).update(wrapper)
        save_optimizer(
            cast(Any, self._state.trainer.model),
            _optimizer(self._state),
            Path(get_step_checkpoint_dir(self.output_dir, self._latest_step)),
            {"name": self.config["trainer_args"]["optim"]},
        )

    async def trainer_logprobs(self, token_ids: list[int]) -> list[float]:
        """Return the trainer's own log p(token | tokens before it) in nats, for every token but the first.

        The weights are on the GPU meanwhile, besides what vLLM holds there.
        """
        state = self._state
        offloaded = state._is_offloaded
        state.reload_to_gpu()
        try:
            return _logprobs(state, token_ids)
        finally:
            if offloaded:
                state.offload_to_cpu()

    @cached_property
    def _state(self) -> UnslothTrainContext:
        state = cast(UnslothTrainContext, super()._state)
        folder = get_last_checkpoint_dir(self.output_dir)
        if folder is not None and get_step_from_dir(self.output_dir) > 0:
            load_optimizer(cast(Any, state.trainer.model), _optimizer(state), Path(folder))
        return state


class TellingService(TellsFailures, GpuService):
    """What ART moves into a process of its own: `GpuService` with this project's errors."""


def _optimizer(state: UnslothTrainContext) -> torch.optim.Optimizer:
    """Return the optimiser itself, which accelerate wraps when training begins."""
    optimizer: Any = state.trainer.optimizer
    return cast(torch.optim.Optimizer, getattr(optimizer, "optimizer", optimizer))


@torch.no_grad()
def _logprobs(state: UnslothTrainContext, token_ids: list[int]) -> list[float]:
    model: Any = state.trainer.model
    head = model.get_output_embeddings().weight
    padding = -len(token_ids) % ALIGNED
    # What comes after the text changes nothing before it.
    tokens = torch.tensor([[*token_ids, *([0] * padding)]], device=head.device)
    one_text = torch.zeros_like(tokens)
    mask = calculate_attn_bias(1, tokens.shape[1], tokens.device, one_text, one_text, torch.bfloat16)
    # ART's own way to ask Unsloth: the head is applied outside, to what the last layer says.
    os.environ["UNSLOTH_RETURN_HIDDEN_STATES"] = "1"
    with torch.autocast("cuda", dtype=torch.bfloat16):
        hidden = model(input_ids=tokens, causal_mask=mask).logits
    logits = hidden[0, : len(token_ids) - 1].float() @ head.float().T
    of_next = tokens[0, 1 : len(token_ids), None]
    return cast(list[float], logits.log_softmax(dim=-1).gather(1, of_next)[:, 0].tolist())
