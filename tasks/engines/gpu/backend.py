"""ART's `LocalBackend` on GPUs: Unsloth trains, vLLM serves, and the trainer can be asked what it thinks."""

from __future__ import annotations

import os
from typing import Literal, cast

from art import TrainableModel
from art.dev.validate import is_dedicated_mode, validate_dedicated_config
from art.local.service import ModelService
from art.utils.output_dirs import get_model_dir
from mp_actors import move_to_child_process

from tasks.engines.art_backend import TitleBackend
from tasks.engines.gpu.megatron_names import megatron_names

with megatron_names():
    from art.dev.get_model_config import get_model_config


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
            from tasks.engines.gpu.service import GpuService

            service = GpuService(
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
