"""What this project's two ART backends have in common: ART's `LocalBackend` that loses nothing in silence.

A subclass says which service trains and serves; trajectories, packing, checkpoints and resume stay ART's.
"""

from __future__ import annotations

import logging
import os
import random
import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, Protocol, cast

import art.local.backend
from art import Model, TrainableModel
from art.local import LocalBackend
from art.preprocessing.pack import PackedTensors
from art.utils.get_model_step import get_model_step

from tasks.engines.title_tokens import prompts_read_once
from tasks.titles.errors import ConfigError, HnTitlesError

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


class TrainerService(Protocol):
    """What this project's services can do besides ART's `ModelService`."""

    async def trainer_logprobs(self, token_ids: list[int]) -> list[float]:
        """Return the trainer's own log p(token | tokens before it) in nats, for every token but the first."""
        ...


class TitleBackend(LocalBackend):
    """A `LocalBackend` for policies of plain text, tracked in MLflow, whose trainer can be asked."""

    def __init__(self, *, path: str, seed: int, in_process: bool) -> None:
        """`seed` decides the order in which trajectories are packed."""
        super().__init__(in_process=in_process, path=path)
        self._seed = seed
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
        service = cast(TrainerService, await self._get_service(model))
        return await service.trainer_logprobs(token_ids)

    async def behind(self, error: Exception) -> HnTitlesError | None:
        """Return the failure of the backend that `error` comes from, None where it is not known to come from one."""
        return None

    def _get_packed_tensors(self, model: Any, *arguments: Any, **options: Any) -> PackedTensors | None:
        """Pack as ART does, in an order that depends on the seed and the step alone, and losing nothing.

        Where titles share their prompt in a packed sequence, it is tokenized once for them, too.
        """
        state = random.getstate()
        random.seed(f"{self._seed}/{get_model_step(model, self._path)}")
        shared = prompts_read_once() if self._supports_result_packing else nullcontext()
        try:
            with shared, warnings.catch_warnings():
                warnings.filterwarnings("error", message="Dropping .* tokenized results")
                return super()._get_packed_tensors(model, *arguments, **options)
        except UserWarning as error:
            raise ConfigError(f"A trajectory does not fit: {error} Raise packed_sequence_length.") from error
        finally:
            random.setstate(state)
