"""The policy's weights with its adapter merged in, for vLLM, and the policy left as it was.

TRL has PEFT add the adapter to the base weights where they stand, and subtract it again. In bfloat16 the difference
is not always what was there before, so the base weights would wander from step to step, and the validator with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

if TYPE_CHECKING:
    from trl import GRPOTrainer


@torch.no_grad()
def merged_weights(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each weight of the base model under its own name, with the active adapter's share where it has one.

    The sum is made in float32 and rounded once to the base weight's type.
    """
    base: Any = model.get_base_model()
    adapted = {
        f"{name}.base_layer.weight": layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)
    }
    for name, weight in base.named_parameters():
        if ".lora_" in name:
            continue
        plain = weight.data
        if name in adapted:
            share: Any = cast(Any, adapted[name]).get_delta_weight(model.active_adapter)
            plain = (plain.float() + share.float()).to(plain.dtype)
        yield name.replace(".base_layer.", "."), plain


def push_merged_weights(trainer: GRPOTrainer) -> None:
    """Make `trainer` hand `merged_weights` to vLLM at every sync."""
    generation = cast(Any, trainer).vllm_generation

    def load() -> Iterator[tuple[str, torch.Tensor]]:
        # TRL would load them one by one, and vLLM looks up the names of all of its weights at each call.
        vllm = generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
        vllm.load_weights(merged_weights(generation.model))
        return iter(())

    colocated = generation.mode == "colocate"
    generation._iter_named_params = load if colocated else lambda: merged_weights(generation.model)
