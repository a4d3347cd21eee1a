"""ART's `ModelService` on a CPU: serves the base model and every checkpoint, and trains the next one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from art import dev
from art.preprocessing.pack import DiskPackedTensors, packed_tensors_from_dir
from art.types import TrainConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.engines.checkpoints import step_folder, steps_on_disk, write_checkpoint
from tasks.engines.cpu.chat import ChatTokenizer, end_of_turn
from tasks.engines.cpu.cores import Cores, use_one_core
from tasks.engines.cpu.models import ServedModels
from tasks.engines.cpu.server import HOST, HttpServer, build_app
from tasks.engines.cpu.settings import CpuSettings
from tasks.engines.cpu.trainer import Trainer
from tasks.engines.cpu.weights import check_supported, copy_state
from tasks.engines.cpu.worker import SamplingWorker
from tasks.titles.errors import ConfigError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class CpuService:
    """One run's models. Sampling and training take turns in one thread, and spread their work over `Cores`."""

    def __init__(self, *, model_name: str, base_model: str, output_dir: str, settings: CpuSettings) -> None:
        self._model_name = model_name
        self._base_model = base_model
        self._checkpoints = Path(output_dir) / "checkpoints"
        self._settings = settings
        self._compute = ThreadPoolExecutor(1, "compute", use_one_core)
        self._cores = Cores(settings.threads)
        self._trainer_step: int | None = None
        """The checkpoint that the trainer's weights are those of; None while an update is under way or broke off."""
        self._trainer: Trainer | None = None
        self._models: ServedModels | None = None
        self._worker: SamplingWorker | None = None
        self._server: HttpServer | None = None

    async def start_openai_server(self, config: dev.OpenAIServerConfig | None) -> tuple[str, int]:
        """Load the models, write checkpoint 0 where there is none, and serve; return host and port.

        Of `config["server_args"]`, `port` and `api_key` are used.
        """
        if self._server is None:
            server_args = (config or {}).get("server_args", {})
            self._server = await self._computed(self._open, server_args)
        return HOST, self._server.port

    def _open(self, server_args: Any) -> HttpServer:
        base = AutoModelForCausalLM.from_pretrained(self._base_model, dtype=torch.float32, use_safetensors=True)
        check_supported(base.config)
        state = copy_state(base)
        trainer = self._trainer = Trainer(base, self._settings, self._cores)
        if not steps_on_disk(self._checkpoints):
            with write_checkpoint(self._checkpoints, 0) as folder:
                trainer.save(folder)
            self._trainer_step = 0
        self._load_trainer()
        models = self._models = ServedModels(
            state,
            base.config,
            base_name=self._base_model,
            run_name=self._model_name,
            checkpoints=self._checkpoints,
            adapters_in_memory=self._settings.adapters_in_memory,
        )
        models.load_step(self._last_step())
        self._worker = SamplingWorker(models, self._compute, self._cores)
        chat = ChatTokenizer(AutoTokenizer.from_pretrained(self._base_model), end_of_turn(base.generation_config))
        server = HttpServer(
            build_app(models, self._worker, chat, api_key=server_args.get("api_key")), server_args.get("port") or 0
        )
        server.start()
        logger.info("serving %s at step %d on %s:%d", self._model_name, self._last_step(), HOST, server.port)
        return server

    async def vllm_engine_is_sleeping(self) -> bool:
        """Return False: the sampler never gives its memory to the trainer."""
        return False

    async def train(
        self,
        disk_packed_tensors: DiskPackedTensors,
        config: TrainConfig,
        _config: dev.TrainConfig,
        verbose: bool = False,
    ) -> AsyncIterator[dict[str, float]]:
        """Train from packed tensors, write the next checkpoint and serve it; yield each update's metrics."""
        packed = packed_tensors_from_dir(**disk_packed_tensors)
        trainer = self._opened(self._trainer)
        await self._computed(self._load_trainer)
        step = self._last_step() + 1
        self._trainer_step = None
        updates = trainer.train(packed, config, _config)
        while (metrics := await self._computed(next, updates, None)) is not None:
            yield metrics
        await self._computed(self._write, step)

    def _write(self, step: int) -> None:
        with write_checkpoint(self._checkpoints, step) as folder:
            self._opened(self._trainer).save(folder)
        self._trainer_step = step
        self._opened(self._models).load_step(step)

    async def train_sft(self, batches: Any, config: Any, verbose: bool = False) -> AsyncIterator[dict[str, float]]:
        """Raise `ConfigError`: this service trains by reinforcement only."""
        raise ConfigError("The CPU service does not train on given answers (SFT); call `backend.train` with rewards.")
        yield {}

    async def register_lora_for_step(self, step: int, checkpoint_dir: str) -> None:
        """Serve the adapter in `checkpoint_dir` as that of `step`: a checkpoint of this run, or one of another's."""
        await self._computed(self._opened(self._models).load_step, step, Path(checkpoint_dir))

    async def prune_loaded_adapters(self, *, retain_steps: Collection[int]) -> None:
        """Let go of adapters in memory; their checkpoints stay and are read again when asked for."""
        self._opened(self._models).retain(retain_steps)

    async def trainer_logprobs(self, token_ids: list[int]) -> list[float]:
        """Return the trainer's own log p(token | tokens before it) in nats, for every token but the first."""
        return await self._computed(self._trainer_logprobs, token_ids)

    def _trainer_logprobs(self, token_ids: list[int]) -> list[float]:
        self._load_trainer()
        return self._opened(self._trainer).logprobs(token_ids)

    async def aclose(self) -> None:
        """Stop serving and training, free the port and end every thread."""
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Do what `aclose` does, for callers without an event loop."""
        if self._worker is not None:
            self._worker.close()
        self._compute.shutdown(cancel_futures=True)
        self._cores.close()
        if self._server is not None:
            self._server.close()
        self._server = self._worker = self._models = self._trainer = None

    def _load_trainer(self) -> None:
        """Bring the trainer to the last checkpoint on disk, where it is not there already."""
        step = self._last_step()
        if self._trainer_step != step:
            self._opened(self._trainer).load(step_folder(self._checkpoints, step))
            self._trainer_step = step

    def _last_step(self) -> int:
        return max(steps_on_disk(self._checkpoints))

    async def _computed(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._compute, function, *arguments)

    @staticmethod
    def _opened(part: Result | None) -> Result:
        if part is None:
            raise RuntimeError("The CPU service is not open: call `start_openai_server` first.")
        return part
