"""ART's `LocalBackend` on GPUs: Unsloth trains, vLLM serves, and the trainer can be asked what it thinks."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any, cast

from art import TrainableModel
from art.dev.validate import is_dedicated_mode, validate_dedicated_config
from art.local.service import ModelService
from art.utils.output_dirs import get_model_dir
from mp_actors import move_to_child_process

from tasks.engines.art_backend import TitleBackend
from tasks.engines.gpu.failures import end, family, lost_trainer
from tasks.titles.errors import EngineDied, HnTitlesError, OutOfMemory

logger = logging.getLogger(__name__)

CLOSE_PATIENCE_S = 30.0
"""Time that the trainer has to end a gradient step and to stop vLLM before its process is ended."""
ANSWER_PATIENCE_S = 60.0
"""Time that the trainer has to say how vLLM's server is; a gradient step may come first."""


class GpuBackend(TitleBackend):
    """`LocalBackend` with this project's service, in the same process that ART would run its own in."""

    def __init__(self, *, path: str, seed: int) -> None:
        super().__init__(path=path, seed=seed, in_process=False)
        self._processes: set[Any] = set()
        """The trainer's process and all that it has started, as far as they have been seen."""

    async def _get_service(self, model: TrainableModel) -> ModelService:
        if model.name not in self._services:
            # Needs megatron, which stands in GPU environments alone.
            from art.dev.get_model_config import get_model_config

            folder = get_model_dir(model=model, art_path=self._path)
            config = get_model_config(base_model=model.base_model, output_dir=folder, config=model._internal_config)
            validate_dedicated_config(config)
            dedicated = is_dedicated_mode(config)
            # Unsloth must be imported before everything that it rewrites; ART's package does so for this variable.
            os.environ["IMPORT_UNSLOTH"] = "1"
            if dedicated:
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, config["trainer_gpu_ids"]))
            # Imported here, as ART does it: it needs Unsloth's TRL.
            from tasks.engines.gpu.service import TellingService

            service = TellingService(model.name, model.base_model, config, folder)
            own_process = not dedicated
            self._services[model.name] = cast(
                ModelService, move_to_child_process(service, process_name="model-service") if own_process else service
            )
        return self._services[model.name]

    async def _prepare_backend_for_training(self, *arguments: Any, **options: Any) -> tuple[str, str]:
        served_at = await super()._prepare_backend_for_training(*arguments, **options)
        self._look_for_processes()
        return served_at

    async def behind(self, error: Exception) -> HnTitlesError | None:
        """Return `EngineDied` where the trainer's process or vLLM's server has ended, else None."""
        if isinstance(error, EngineDied | OutOfMemory):
            return None
        for service in self._services.values():
            try:
                ended = await asyncio.wait_for(cast(Any, service).server_failure(), ANSWER_PATIENCE_S)
            except TimeoutError:
                continue
            except RuntimeError as lost:
                return lost_trainer(lost)
            if ended is not None:
                return EngineDied(ended)
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
            # A service in this process (dedicated GPUs) is no proxy, and its vLLM is this process's child.
            child = vars(service).get("_process", vars(service).get("_vllm_process"))
            self._processes |= family(child.pid if child is not None else None)
