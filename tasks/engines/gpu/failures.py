"""What ends a training with ART on a GPU, told in this project's errors, and that nothing stays behind on the GPU.

ART's service runs in a child process, the trainer's; vLLM's server is a child of that. What the service raises comes
back pickled, and an exception that cannot be unpickled (such as some HTTP clients raise) would leave the caller waiting
for ever. So the service raises this project's errors, which are text alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import re
import signal
import time
import traceback
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from pathlib import Path
from typing import Any, TypeVar, cast

import httpx
import psutil

from tasks.engines.device import full_memory_in_log, out_of_memory
from tasks.titles.child_process import end_of_log
from tasks.titles.errors import EngineDied, HnTitlesError, OutOfMemory

logger = logging.getLogger(__name__)
Method = TypeVar("Method", bound=Callable[..., Coroutine[Any, Any, Any]])

NOTICE_S = 10.0
"""Time within which a server that no longer answers is seen to have ended: ART looks twice a second, and vLLM itself
takes some seconds to end after its engine has."""
_POLL_S = 0.2
END_PATIENCE_S = 10.0
"""Time that processes have to end after the one that started them; ART gives vLLM 6 s."""
CONTINUES = "The same command continues from the last checkpoint."
# In vLLM's log the reason stands before the traceback of the process that waited for it.
_REASON = re.compile(r"\b\w*(?:Error|Exception): .+")
# A warning of vLLM's, and one of PyTorch's own logger, which comes before it does without what it misses.
_WARNING = re.compile(r"\bWARNING \d\d-\d\d |\bW\d{4} \d\d:")
_REASONS, _LOG_BYTES = 2, 256 * 1024


def _told(method: Method) -> Method:
    @functools.wraps(method)
    async def telling(self: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return await method(self, *arguments, **options)
        except Exception as error:
            failure = await self._failure(error)
        # Out of the handler, where no other exception hangs on to it: all of them would be pickled.
        raise failure

    return cast(Method, telling)


class TellsFailures:
    """What stands before ART's Unsloth service in a class: its methods raise this project's errors."""

    @_told
    async def start_openai_server(self, config: Any) -> tuple[str, int]:
        """Start vLLM; raises `OutOfMemory` or `EngineDied` with the end of its log where it does not start."""
        return await super().start_openai_server(config)  # type: ignore[misc, no-any-return]

    async def train(self, *arguments: Any, **options: Any) -> AsyncIterator[dict[str, float]]:
        """Train; raises `OutOfMemory` and `EngineDied`."""
        try:
            async for result in super().train(*arguments, **options):  # type: ignore[misc]
                yield result
            return
        except Exception as error:
            failure = await self._failure(error)
        raise failure

    @_told
    async def register_lora_for_step(self, step: int, checkpoint_dir: str) -> None:
        """Serve an adapter; raises `OutOfMemory` and `EngineDied`."""
        await super().register_lora_for_step(step, checkpoint_dir)  # type: ignore[misc]

    @_told
    async def prune_loaded_adapters(self, *, retain_steps: set[int]) -> None:
        """Let go of adapters; raises `OutOfMemory` and `EngineDied`."""
        await super().prune_loaded_adapters(retain_steps=retain_steps)  # type: ignore[misc]

    @_told
    async def trainer_logprobs(self, token_ids: list[int]) -> list[float]:
        """Ask the trainer; raises `OutOfMemory`."""
        return await super().trainer_logprobs(token_ids)  # type: ignore[misc, no-any-return]

    async def server_failure(self) -> EngineDied | OutOfMemory | None:
        """Return why vLLM's server ended, with the end of its log; None while it answers, or was never started.

        Waits up to `NOTICE_S` for what is known of a server that does not answer.
        """
        service: Any = self
        if service._vllm_port == 0:
            return None
        given_up = time.monotonic() + NOTICE_S
        while True:
            try:
                service._raise_if_child_failed()
            except RuntimeError as error:
                return self._server_failed(str(error))
            if service._lifecycle.closing or time.monotonic() > given_up or await _is_healthy(service._vllm_base_url):
                return None
            await asyncio.sleep(_POLL_S)

    async def _failure(self, error: Exception) -> Exception:
        """Return what to raise in place of `error`."""
        if isinstance(error, HnTitlesError):
            return type(error)(str(error))
        full = out_of_memory(error)
        if full is not None:
            return full
        ended = await self.server_failure()
        if ended is not None:
            return ended
        # ART closes everything when an update breaks off, and forgets how the server ended. Over HTTP the service talks
        # to nobody else.
        if isinstance(error, httpx.HTTPError):
            return self._server_failed(f"{type(error).__name__}: {error}")
        # ART's own words where vLLM ends, or is not ready in time, while it is started.
        if isinstance(error, RuntimeError | TimeoutError) and str(error).startswith("vLLM subprocess"):
            return self._server_failed(str(error))
        return RuntimeError("".join(traceback.format_exception(error)))

    def _server_failed(self, told: str) -> EngineDied | OutOfMemory:
        service: Any = self
        log = Path(service.output_dir, "logs", "vllm-runtime.log")
        reasons = "".join(f"\n{reason}" for reason in _reasons(log))
        failed = f"vLLM's server, which writes the titles, has failed: {_how(told)}."
        full = full_memory_in_log(reasons)
        if full is not None:
            return OutOfMemory(f"{full} {failed}{reasons}{end_of_log(log)}")
        return EngineDied(
            f"{failed} A full GPU is one reason (lower art.vllm_memory_share or end other processes there); where the "
            f"machine's memory is full the kernel kills. {CONTINUES}{reasons}{end_of_log(log)}"
        )


def lost_trainer(error: Exception) -> EngineDied:
    """Return what to raise where the trainer's process has gone, as `error` of ART's `mp_actors` says."""
    return EngineDied(
        f"The trainer's process has ended: {error}. Where it was killed, the machine's memory may have been full: the "
        f"kernel's log tells. {CONTINUES}"
    )


def family(pid: int | None) -> set[psutil.Process]:
    """Return a process and all that it has started, directly or not; empty where it has gone."""
    if pid is None:
        return set()
    try:
        process = psutil.Process(pid)
        return {process, *process.children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


def end(processes: Collection[psutil.Process], patience_s: float = END_PATIENCE_S) -> None:
    """Wait until `processes`, which have been told to end, are gone; kill those that are still there afterwards."""
    for process in _left_after(patience_s, processes):
        logger.warning("Process %d did not end and is killed", process.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _left_after(patience_s, processes)


def _left_after(seconds: float, processes: Collection[psutil.Process]) -> list[psutil.Process]:
    """Return those of `processes` that are there after `seconds`; at once where none is."""
    given_up = time.monotonic() + seconds
    while (left := [process for process in processes if is_there(process)]) and time.monotonic() < given_up:
        time.sleep(_POLL_S)
    return left


def is_there(process: psutil.Process) -> bool:
    """Return whether `process` has not ended yet."""
    # One that has ended and that nobody has asked for its exit code holds nothing.
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


async def _is_healthy(base_url: str) -> bool:
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
            return (await client.get(f"{base_url}/health")).status_code == 200
    except httpx.HTTPError:
        return False


def _how(told: str) -> str:
    """Return ART's words for an end, with the signal in the place of the exit code that stands for it."""
    match = re.search(r"code (-?\d+)", told)
    # ART's supervisor exits with the server's code, of which a signal's, below 0, is left modulo 256.
    number = -int(match[1]) % 256 if match else 0
    if match and number in set(signal.Signals):
        told = told.replace(match[0], f"signal {signal.Signals(number).name}")
    return told.partition(". Check logs")[0]


def _reasons(log: Path) -> list[str]:
    """Return the first errors of the end of a log that it names, each once."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_BYTES))
            written = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    told = "\n".join(line for line in written.splitlines() if not _WARNING.search(line))
    return list(dict.fromkeys(_REASON.findall(told)))[:_REASONS]
