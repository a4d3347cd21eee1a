"""ART's `LocalBackend` with the CPU service in place of Unsloth and vLLM."""

from __future__ import annotations

from typing import cast

from art import TrainableModel
from art.local.service import ModelService
from art.utils.output_dirs import get_model_dir

from tasks.engines.art_backend import TitleBackend
from tasks.engines.cpu.service import CpuService
from tasks.engines.cpu.settings import CpuSettings

__all__ = ["CpuBackend", "CpuSettings"]


class CpuBackend(TitleBackend):
    """Trains and serves on a CPU; everything but the service is ART's own."""

    def __init__(self, *, path: str, settings: CpuSettings | None = None) -> None:
        self._settings = settings or CpuSettings()
        super().__init__(path=path, seed=self._settings.seed, in_process=True)
        # The trajectories of a group share one copy of their prompt in a packed sequence, and the
        # trainer takes sequences of any length.
        self._supports_result_packing = True
        self._packed_sequence_length_requires_chunk_alignment = False

    async def _get_service(self, model: TrainableModel) -> ModelService:
        if model.name not in self._services:
            service = CpuService(
                model_name=model.name,
                base_model=model.base_model,
                output_dir=get_model_dir(model=model, art_path=self._path),
                settings=self._settings,
            )
            self._services[model.name] = cast(ModelService, service)
        return self._services[model.name]
