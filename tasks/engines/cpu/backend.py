"""ART's `LocalBackend` with the CPU service in place of Unsloth and vLLM."""

from __future__ import annotations

import logging
import os
import random
import warnings
from types import SimpleNamespace
from typing import Any, cast

import art.local.backend
from art import Model, TrainableModel
from art.local import LocalBackend
from art.local.service import ModelService
from art.preprocessing.pack import PackedTensors
from art.utils.get_model_step import get_model_step
from art.utils.output_dirs import get_model_dir

from tasks.engines.cpu.service import CpuService
from tasks.engines.cpu.settings import CpuSettings
from tasks.titles.errors import ConfigError

__all__ = ["CpuBackend", "CpuSettings"]

logger = logging.getLogger(__name__)


def _log_line(*parts: object, **_: object) -> None:
    logger.info(" ".join(str(part) for part in parts))


class _HiddenBar:
    """What ART asks of a progress bar, without one."""

    def __init__(self, total: int, **_: object) -> None:
        self.total = total

    def update(self, count: int) -> None:
        """Do nothing."""

    def set_postfix(self, values: object) -> None:
        """Do nothing."""

    def refresh(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


# ART's backend module speaks through `print` and progress bars; its lines go to this module's logger,
# and its bars are not drawn over those of the command line.
vars(art.local.backend).update(print=_log_line, tqdm=SimpleNamespace(tqdm=_HiddenBar))


class CpuBackend(LocalBackend):
    """Trains and serves on a CPU; everything but the service is ART's own."""

    def __init__(self, *, path: str, settings: CpuSettings | None = None) -> None:
        super().__init__(in_process=True, path=path)
        self._settings = settings or CpuSettings()
        # The trajectories of a group share one copy of their prompt in a packed sequence, and the
        # trainer takes sequences of any length.
        self._supports_result_packing = True
        self._packed_sequence_length_requires_chunk_alignment = False
        # ART starts Weights & Biases whenever its key is in the environment; this project tracks in MLflow.
        if os.environ.pop("WANDB_API_KEY", None) is not None:
            logger.info("WANDB_API_KEY is not used and was taken out of this process's environment")

    async def register(self, model: Model) -> None:
        """Register `model` as `LocalBackend` does; the service starts with it."""
        # Spares ART's attempt to load an image processor for a model of plain text.
        if isinstance(model, TrainableModel):
            self._image_processors[model.base_model] = None
        await super().register(model)

    async def trainer_logprobs(self, model: TrainableModel, token_ids: list[int]) -> list[float]:
        """Return the trainer's own log p(token | tokens before it) in nats, for every token but the first."""
        service = cast(CpuService, await self._get_service(model))
        return await service.trainer_logprobs(token_ids)

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

    def _get_packed_tensors(self, model: Any, *arguments: Any, **options: Any) -> PackedTensors | None:
        """Pack as ART does, in an order that depends on the seed and the step alone, and losing nothing."""
        state = random.getstate()
        random.seed(f"{self._settings.seed}/{get_model_step(model, self._path)}")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Dropping .* tokenized results")
                return super()._get_packed_tensors(model, *arguments, **options)
        except UserWarning as error:
            raise ConfigError(f"A trajectory does not fit: {error} Raise packed_sequence_length.") from error
        finally:
            random.setstate(state)
