"""The vLLM server of `trl.vllm_mode = 'server'`: at an address of the settings', or in a process of our own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from tasks.engines.device import full_memory_in_log
from tasks.engines.trl_engine.arguments import trainer_environment
from tasks.engines.trl_engine.gpus import free_port, visible_gpus
from tasks.titles.child_process import ChildProcess
from tasks.titles.config import Profile, Settings
from tasks.titles.errors import OutOfMemory, ServiceUnavailable

logger = logging.getLogger(__name__)

PROCESS = "tasks.engines.trl_engine.vllm_process"
"""The module that runs vLLM."""
LOG = "vllm.log"
START_TIMEOUT_S = 600.0
"""vLLM compiles its model when it sees it for the first time: a minute for a small one, minutes for a large one."""
_POLL_S = 0.5
_REASON_LINES = 200


@asynccontextmanager
async def open_vllm_server(profile: Profile, base_model: str, log_folder: Path) -> AsyncIterator[str | None]:
    """Yield the address of the server that TRL's trainer generates with, None where it needs none.

    A server of our own has the GPUs of `trl.server_gpus`, logs into `log_folder` and ends with this context, however
    it is left. Raises `ServiceUnavailable` or `OutOfMemory` with the end of its log where it does not get ready,
    and `ConfigError` for GPUs that are not there.
    """
    if profile.device == "cpu" or profile.trl.vllm_mode == "colocate":
        yield None
        return
    if not profile.trl.server_gpus:
        yield Settings().vllm_server_url
        return
    port = free_port()
    server = ChildProcess(
        server_command(profile, base_model, port, Settings().trl_python),
        log_path=log_folder / LOG,
        environment={**os.environ, **server_environment(profile)},
    )
    logger.info("vLLM's server starts as process %d, log in %s", server.pid, server.log_path)
    try:
        url = f"http://127.0.0.1:{port}"
        await _wait_until_ready(server, url)
        yield url
    finally:
        await asyncio.shield(asyncio.to_thread(server.stop))


def server_command(profile: Profile, base_model: str, port: int, python: Path | None = None) -> list[str]:
    """Return the command of a server that takes weights from TRL's trainer, as TRL's own `vllm-serve` starts it.

    `python` is that of the trainer's environment; None: this one.
    """
    options = {
        "host": "127.0.0.1",
        "port": port,
        "tensor-parallel-size": len(profile.trl.server_gpus),
        "gpu-memory-utilization": profile.trl.vllm_memory_share,
        "max-model-len": profile.max_prompt_tokens + profile.max_completion_tokens,
        # TRL's own vLLM captures graphs for no more than a step's titles, too; by default it would be for hundreds.
        "max-num-seqs": profile.groups_per_step * profile.group_size,
        "dtype": "bfloat16",  # the trainer's
        "uvicorn-log-level": "warning",
        "weight-transfer-config": json.dumps({"backend": "nccl"}),
        # after temperature and the like, as the trainer computes them
        "logprobs-mode": "processed_logprobs",
        "max-logprobs": -1,
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [str(python or sys.executable), "-m", PROCESS, "serve", base_model, *flags]


def server_environment(profile: Profile) -> dict[str, str]:
    """Return the environment variables that the server's process needs besides those it inherits."""
    return {
        **trainer_environment(profile),
        **visible_gpus(profile.trl.server_gpus),
        # The endpoints that weights are passed on by are there in this mode alone.
        "VLLM_SERVER_DEV_MODE": "1",
    }


async def _wait_until_ready(server: ChildProcess, url: str) -> None:
    started = time.monotonic()
    async with httpx.AsyncClient(base_url=url, timeout=5.0, trust_env=False) as client:
        while True:
            code = server.poll()
            if code is not None:
                ended = f"vLLM's server ended with exit code {code} before it was ready."
                # In its log the reason stands before the traceback of the process that waited for it.
                full = full_memory_in_log(server.log_end(_REASON_LINES))
                if full is not None:
                    raise OutOfMemory(f"{full} {ended}{server.log_end()}")
                raise ServiceUnavailable(f"{ended}{server.log_end()}")
            if time.monotonic() - started > START_TIMEOUT_S:
                raise ServiceUnavailable(f"vLLM's server was not ready after {START_TIMEOUT_S:g} s.{server.log_end()}")
            with contextlib.suppress(httpx.TransportError):
                response = await client.get("/health")
                if response.status_code == 200:
                    return
            await asyncio.sleep(_POLL_S)
