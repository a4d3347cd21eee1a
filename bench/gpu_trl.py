"""Measures TRL on one GPU: this project's loop, vLLM's offline throughput and a bare `GRPOTrainer`, each in a process.

The loop's own steps also tell what memory each of them took: `--steps 50` shows whether it grows.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from bench.gpu_measures import WARM_UP, BareStep, Measured, Plain, do_parts, measured, rates
from bench.gpu_memory import told, whole_lines
from bench.gpu_watch import GpuWatch
from tasks.engines.contract import TrainingRequest
from tasks.engines.trl_engine import arguments
from tasks.engines.trl_engine.launch import train
from tasks.engines.trl_engine.request_file import write_request
from tasks.titles.child_process import ChildProcess

_POLL_S = 0.25
Say = Callable[..., None]


async def measure_trl(
    request: TrainingRequest,
    found: dict[str, Any],
    watch: GpuWatch,
    say: Say,
    keep: Callable[[], None],
    *,
    steps: int,
    bare_steps: int,
    measure_offline: Callable[[], dict[str, Any]],
) -> None:
    """Put what `bench.gpu` writes of TRL into `found`, part by part, and call `keep` after each.

    `measure_offline` takes vLLM's share of a GPU's memory for itself.
    """

    async def ours() -> None:
        found["ours"] = await _ours(request, found, watch, say, keep, steps)
        say("ours", found["ours"].told())

    async def bare() -> None:
        found["bare"] = await _bare(request, watch, say, bare_steps)
        say("bare", found["bare"].told())

    async def offline() -> None:
        found["offline"] = await asyncio.to_thread(measure_offline)
        say("offline", found["offline"])

    parts = {"ours": ours, "offline": offline} | ({"bare": bare} if bare_steps else {})
    await do_parts(parts, found, say, keep)


async def _ours(
    request: TrainingRequest, found: dict[str, Any], watch: GpuWatch, say: Say, keep: Callable[[], None], steps: int
) -> Measured:
    """Train, and keep what is known after every tenth step."""
    begun = time.time()
    seen: list[float] = []
    memory: dict[str, Any] = {}
    found["memory"] = memory

    def figures() -> Measured:
        done = len(seen) - 1
        return measured(request, watch, since=seen[WARM_UP], until=seen[-1], steps=range(1, done + 1))

    def show(progress: Any) -> None:
        seen.append(time.time())
        own = told(request.run_dir).get(progress.step, {})
        on_gpu = watch.peak_gb(seen[-2], seen[-1]) if len(seen) > 1 else None
        say("ours step", progress.step, rates(progress.metrics), own, {"gpu_peak_gb": on_gpu})
        if progress.step % 5 == 0 or progress.step == steps:
            memory[str(progress.step)] = {**own, "gpu_peak_gb": on_gpu}
        if progress.step == 0:
            found["register_s"] = round(seen[0] - begun, 1)
        elif progress.step % 10 == 0 and progress.step < steps:
            found["ours"] = figures()
            keep()

    process, arguments.PROCESS = arguments.PROCESS, "bench.gpu_trl_process"
    try:
        await train(request, tracker=Plain(), on_progress=show)
    finally:
        arguments.PROCESS = process
    if steps > WARM_UP + 1:
        # With what a step's own time leaves out: its commit. The last step has a validation besides.
        found["wall_steps_per_hour"] = round(3600 * (steps - 1 - WARM_UP) / (seen[-2] - seen[WARM_UP]), 1)
    return figures()


async def _bare(request: TrainingRequest, watch: GpuWatch, say: Say, steps: int) -> Measured:
    """Let `gpu_trl_bare` make `steps` steps after those that are not counted."""
    folder = request.run_dir / "bare"
    folder.mkdir()
    out = folder / "steps.jsonl"
    command = [sys.executable, "-m", "bench.gpu_trl_bare", str(write_request(request, folder)), str(out)]
    child = ChildProcess(
        [*command, str(steps + WARM_UP)],
        log_path=folder / "log",
        environment={**os.environ, **arguments.trainer_environment(request.profile)},
    )
    rows: list[dict[str, float]] = []
    try:
        while len(rows) < steps + WARM_UP:
            code = child.poll()
            for row in whole_lines(out)[len(rows) :]:
                rows.append(row)
                say("bare step", len(rows), row)
            if code is not None and len(rows) < steps + WARM_UP:
                raise RuntimeError(f"the bare trainer ended with exit code {code}{child.log_end()}")
            await asyncio.sleep(_POLL_S)
    finally:
        await asyncio.to_thread(child.stop)
    done = [BareStep(row["rollout_s"], row["train_s"], int(row["tokens"])) for row in rows[WARM_UP:]]
    return Measured.of_bare(request, done, watch, rows[WARM_UP - 1]["at"], rows[-1]["at"])
