"""ART's `LocalBackend` on GPUs: Unsloth trains, vLLM serves, and the trainer can be asked what it thinks."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any, Literal, cast

from art import TrainableModel
from art.dev.validate import is_dedicated_mode, validate_dedicated_config
from art.local.service import ModelService
from art.utils.output_dirs import get_model_dir
from mp_actors import move_to_child_process

from tasks.engines.art_backend import TitleBackend
from tasks.engines.gpu.failures import end, family, lost_trainer
from tasks.engines.gpu.megatron_names import megatron_names
from tasks.titles.errors import EngineDied, HnTitlesError, OutOfMemory

with megatron_names():
    from art.dev.get_model_config import get_model_config

logger = logging.getLogger(__name__)

CLOSE_PATIENCE_S = 30.0
"""Time that the trainer has to end a gradient step and to stop vLLM before its process is ended."""
ANSWER_PATIENCE_S = 60.0
"""Time that the trainer has to say how vLLM's server is; a gradient step may come first."""


class GpuBackend(TitleBackend):
    """`LocalBackend` with this project's service, in a process of its own.

    `updates_per_step` and `sleep` are those of `GpuService`.
    """

    def __init__(
        self, *, path: str, seed: int, updates_per_step: Literal["one", "per_sequence"], sleep: bool = True
    ) -> None:
        super().__init__(path=path, seed=seed, in_process=False)
        self._updates_per_step: Literal["one", "per_sequence"] = updates_per_step
        self._sleep = sleep
        # The trajectories of a group share one copy of their prompt in a packed sequence, and the
        # trainer takes sequences of any length.
        self._supports_result_packing = updates_per_step == "one"
        self._packed_sequence_length_requires_chunk_alignment = updates_per_step == "per_sequence"
        self._processes: set[Any] = set()
        """The trainer's process and all that it has started, as far as they have been seen."""

    async def _get_service(self, model: TrainableModel) -> ModelService:
        if model.name not in self._services:
            folder = get_model_dir(model=model, art_path=self._path)
            config = get_model_config(base_model=model.base_model, output_dir=folder, config=model._internal_config)
            validate_dedicated_config(config)
            # Unsloth must be imported before everything that it rewrites; ART's package does so for this variable.
            os.environ["IMPORT_UNSLOTH"] = "1"
            if is_dedicated_mode(config):
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, config["trainer_gpu_ids"]))
            # Imported here, as ART does it: it needs Unsloth's TRL.
            from tasks.engines.gpu.service import TellingService

            service = TellingService(
                model_name=model.name,
                base_model=model.base_model,
                config=config,
                output_dir=folder,
                updates_per_step=self._updates_per_step,
                sleep=self._sleep,
            )
            # With GPUs of its own, too, where ART would stay in this process: Unsloth rewrites what it imports, and
            # the loop goes on while it trains.
            self._services[model.name] = cast(
                ModelService, move_to_child_process(service, process_name="model-service")
            )
        return self._services[model.name]

    async def _prepare_backend_for_training(self, *arguments: Any, **options: Any) -> tuple[str, str]:
        served_at = await super()._prepare_backend_for_training(*arguments, **options)
        self._look_for_processes()
        return served_at

    async def behind(self, error: Exception) -> HnTitlesError | None:
        """Return `EngineDied` or `OutOfMemory` where the trainer's process or vLLM's server has ended, else None."""
        if isinstance(error, EngineDied | OutOfMemory):
            return None
        for service in self._services.values():
            try:
                ended: EngineDied | OutOfMemory | None = await asyncio.wait_for(
                    cast(Any, service).server_failure(), ANSWER_PATIENCE_S
                )
            except TimeoutError:
                continue
            except RuntimeError as lost:
                return lost_trainer(lost)
            if ended is not None:
                return ended
        return None

    async def close(self) -> None:
        """Close as `LocalBackend` does, also where the trainer's process has died or hangs, and wait for the end.

        When this returns, nothing that was started is left on the GPU.
        """
        self._look_for_processes()
        try:
            await asyncio.wait_for(super().close(), CLOSE_PATIENCE_S)
        except (RuntimeError, TimeoutError) as error:
            logger.warning("The trainer's process does not close by itself (%s) and is ended", error)
            self._close()
        finally:
            processes, self._processes = self._processes, set()
            await asyncio.shield(asyncio.to_thread(end, processes))

    def _look_for_processes(self) -> None:
        for service in self._services.values():
            child = vars(service).get("_process")
            self._processes |= family(child.pid if child is not None else None)
