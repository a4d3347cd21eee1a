"""What the CPU service can be told; everything else is ART's or fixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CpuSettings:
    """How the adapter is shaped, how it is trained and how many cores that may take."""

    lora_rank: int = 8
    lora_alpha: int = 8
    max_grad_norm: float = 0.1
    updates_per_step: Literal["one", "per_sequence"] = "one"
    """One optimiser update over all packed sequences of a step, or ART's habit: one per packed sequence."""
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    """AdamW's; both are the values of ART's own trainer (`art/dev/get_model_config.py`)."""
    seed: int = 1
    """Decides the adapter's first weights and the order in which trajectories are packed."""
    threads: int | None = None
    """Cores to compute on; None takes all that the process may use."""
    adapters_in_memory: int = 4
    """Checkpoints held ready for sampling; a further one is read from disk when it is asked for."""
