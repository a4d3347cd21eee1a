"""The GPU service as the bench needs it: it also trains as ART alone does, and compares the two ways.

Lives in the process that ART moves the service to.
"""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# First: it imports ART, and with it Unsloth, before everything that Unsloth rewrites.
from tasks.engines.gpu.service import TellingService, UnslothService, _optimizer, packed_tensors_from_dir

# isort: split
import torch
from art.preprocessing.pack import DiskPackedTensors

from bench.gpu_memory import tell
from bench.gpu_proof import compare


@dataclass
class MeasuredService(TellingService):
    """This project's service, and ART's own training on the same model, optimiser and server."""

    alone: bool = False
    """Whether ART trains without this project's additions."""

    async def train_as_art(self, *arguments: Any) -> AsyncIterator[dict[str, float]]:
        """Train by ART's own method, unmodified; the garbage collector sees all that it would see there."""
        gc.unfreeze()
        self.alone = True
        async for result in UnslothService.train(self, *arguments):
            yield result

    async def _train_at_once(self, *arguments: Any) -> dict[str, float]:
        metrics = await super()._train_at_once(*arguments)
        tell(Path(self.output_dir), self._latest_step)
        return metrics

    async def _reload_adapter(self, checkpoint_path: str, step: int) -> None:
        service = UnslothService if self.alone else TellingService
        await service._reload_adapter(self, checkpoint_path, step)

    async def stay_awake(self) -> None:
        """Let vLLM sleep no more while a step trains."""
        self.sleep = False

    async def make_room(self) -> None:
        """Let vLLM give its memory back where it shares the trainer's GPU."""
        if not self.is_dedicated:
            await self._sleep_runtime()

    async def take_room(self) -> None:
        """Let vLLM serve again."""
        if not self.is_dedicated:
            await self._wake_runtime()

    async def compare(self, shared: DiskPackedTensors, alone: DiskPackedTensors) -> dict[str, Any]:
        """Return the figures of `gpu_proof.compare`, taken while vLLM sleeps or on the trainer's own GPU."""
        await self.make_room()
        self._state.reload_to_gpu()
        try:
            model: Any = self._state.trainer.model
            pair = packed_tensors_from_dir(**shared), packed_tensors_from_dir(**alone)
            return compare(model, _optimizer(self._state), *pair)
        finally:
            if not self._stays:
                self._state.offload_to_cpu()
            gc.collect()
            torch.cuda.empty_cache()
            await self.take_room()
