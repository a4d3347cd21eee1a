"""ART's backend for GPUs with its own processes, but no trainer, and a double in the place of vLLM.

python gpu_failure_parts.py FOLDER   opens the backend, says so, and waits
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import torch
from art.local.service import ModelService
from art.unsloth.service import UnslothService
from mp_actors import move_to_child_process

from tasks.engines.art_session import open_backend
from tasks.engines.gpu import backend
from tasks.engines.gpu.failures import TellsFailures
from tasks.starter.paths import BASE_MODEL
from tasks.titles.config import parse_profile

ENGINE_WORDS = "vLLM's engine"
DOUBLE = Path(__file__).with_name("vllm_process_double.py")
MEMORY_IS_FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB"
CONFIG = {"rollout_weights_mode": "lora", "engine_args": {}}


class Untrained(UnslothService):
    """ART's service, which starts and watches the server, without Unsloth's trainer."""

    @cached_property
    def _state(self) -> Any:
        return SimpleNamespace(offload_to_cpu=lambda: None)

    async def _train_shared(self, *_: Any) -> AsyncIterator[dict[str, float]]:
        await self._sleep_runtime()
        yield {"loss": 1.0}
        raise torch.OutOfMemoryError(MEMORY_IS_FULL)

    async def trainer_logprobs(self, token_ids: list[int]) -> list[float]:
        raise KeyError("a fault of this program")


class Service(TellsFailures, Untrained):
    """It with this project's errors."""


def service(folder: Path) -> Service:
    """Return the service of a run whose checkpoint 0 is there; the double is started in the place of vLLM."""
    os.environ["ART_VLLM_RUNTIME_BIN"] = shlex.join([sys.executable, str(DOUBLE)])
    os.environ["ART_VLLM_RUNTIME_PROJECT_ROOT"] = str(folder)
    (folder / "checkpoints" / "0000").mkdir(parents=True, exist_ok=True)
    return Service("policy", "base", cast(Any, CONFIG), str(folder))


class Backend(backend.GpuBackend):
    """The GPU's backend with that service, in a process of its own as on a GPU."""

    async def _get_service(self, model: Any) -> ModelService:
        if model.name not in self._services:
            self._services[model.name] = cast(ModelService, move_to_child_process(service(Path(self._path))))
        return self._services[model.name]


def opened(folder: Path) -> AbstractAsyncContextManager[tuple[Any, Any]]:
    """Open the backend as a training does."""
    backend.GpuBackend = Backend  # type: ignore[misc]
    own = parse_profile(
        {
            "name": "tests",
            "device": "cuda",
            "train_stories": 1,
            "val_stories": 1,
            "test_stories": 1,
            "max_prompt_tokens": 400,
            "groups_per_step": 1,
            "max_steps": 1,
            "learning_rate": {"art": 1e-3, "trl": 1e-3},
        },
        source="tests",
    )
    return open_backend(own, str(BASE_MODEL), folder)


def part(of: set[psutil.Process], words: str) -> psutil.Process:
    """Return the process whose command says `words`: the server's or its engine's, not the one that watches it."""
    (found,) = [one for one in of if words in " ".join(one.cmdline()[:3]) and "managed_process" not in one.cmdline()[1]]
    return found


async def wait(folder: Path) -> None:
    async with opened(folder):
        sys.stdout.write("opened\n")
        sys.stdout.flush()
        await asyncio.sleep(600)


if __name__ == "__main__":
    asyncio.run(wait(Path(sys.argv[1])))
