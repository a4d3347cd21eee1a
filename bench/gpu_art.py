"""Measures ART on one GPU, with one start of trainer and server.

In this order: this project's loop with a vLLM that sleeps while a step trains; vLLM's offline throughput, while the
server sleeps; the loop with a server that stays awake; ART's bare loop, its own training on the same service; and a
packed update against its trajectories one by one.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bench.gpu_measures import Measured, Plain, do_parts, measured, rates
from bench.gpu_memory import told
from bench.gpu_watch import GpuWatch
from tasks.engines.contract import Progress, TrainingRequest
from tasks.engines.resume import stored_state
from tasks.titles.config import override_profile
from tasks.titles.story import Prompt

if TYPE_CHECKING:
    from bench.gpu_bare import BareLoop

Say = Callable[..., None]


async def measure_art(
    request: TrainingRequest,
    found: dict[str, Any],
    watch: GpuWatch,
    say: Say,
    keep: Callable[[], None],
    *,
    steps: int,
    bare_steps: int,
    prove: bool,
    measure_offline: Callable[[], dict[str, Any]],
) -> None:
    """Put what `bench.gpu` writes of ART into `found`, part by part, and call `keep` after each.

    `measure_offline` takes vLLM's share of a GPU's memory for itself.
    """
    from tasks.engines.art_loop import train
    from tasks.engines.art_session import open_session

    started = time.monotonic()
    with _measured_service():
        async with open_session(request) as (session, _):
            found["register_s"] = round(time.monotonic() - started, 1)
            say("registered after", found["register_s"], "s")
            service = await session.backend._get_service(session.model)
            folder = Path(service.output_dir)

            async def ours(kind: str, until: int) -> None:
                own = replace(request, profile=override_profile(request.profile, [f"max_steps={until}"]))
                since = time.time()

                def show(progress: Progress) -> None:
                    memory = told(folder).get(progress.step, {})
                    say(kind, "step", progress.step, rates(progress.metrics), memory)
                    if memory and (progress.step % 5 == 0 or progress.step == until):
                        found.setdefault("memory", {})[str(progress.step)] = memory

                await train(
                    own,
                    session=session,
                    state=stored_state(request.run_dir, "art"),
                    tracker=Plain(),
                    on_progress=show,
                )
                found[kind] = measured(request, watch, since=since, steps=range(until - steps + 1, until + 1))
                say(kind, found[kind].told())

            async def offline() -> None:
                await service.make_room()
                try:
                    found["offline"] = await asyncio.to_thread(measure_offline)
                finally:
                    await service.take_room()
                say("offline", found["offline"])

            async def awake() -> None:
                await service.stay_awake()
                await ours("awake", 2 * steps)

            async def proof() -> None:
                found["proof"] = await _proof(session, request, service)
                for name, figures in found["proof"].items():
                    say("proof", name, figures)

            async def bare() -> None:
                found["bare"] = await _bare(session, request, service, watch, say, bare_steps)
                say("bare", found["bare"].told())

            # The bare loop writes checkpoints that this project's loop does not know of: it comes after it.
            parts = {"ours": lambda: ours("ours", steps), "offline": offline, "awake": awake}
            parts |= {"bare": bare} if bare_steps else {}
            parts |= {"proof": proof} if prove else {}
            await do_parts(parts, found, say, keep)


@asynccontextmanager
async def _as_art_does(session: Any, service: Any) -> AsyncIterator[None]:
    """Let the session's backend pack and train as `LocalBackend` does."""
    backend = session.backend
    backend._supports_result_packing, backend._packed_sequence_length_requires_chunk_alignment = False, True
    backend._services[session.model.name] = _ArtService(service)
    try:
        yield
    finally:
        backend._supports_result_packing, backend._packed_sequence_length_requires_chunk_alignment = True, False
        backend._services[session.model.name] = service


class _ArtService:
    """The service, trained by ART's own method."""

    def __init__(self, service: Any) -> None:
        self.train = service.train_as_art
        self._service = service

    def __getattr__(self, name: str) -> Any:
        return getattr(self._service, name)


def _bare_loop(session: Any, request: TrainingRequest) -> BareLoop:
    from bench.gpu_bare import BareLoop

    return BareLoop(
        session.model,
        session.backend,
        request.reward_model_url,
        titles=request.profile.group_size,
        tokens=request.profile.max_completion_tokens,
    )


async def _bare(
    session: Any, request: TrainingRequest, service: Any, watch: GpuWatch, say: Say, steps: int
) -> Measured:
    profile = request.profile
    loop = _bare_loop(session, request)
    done, since = [], 0.0
    async with _as_art_does(session, service):
        # The first step compiles what Unsloth's trainer has not compiled yet, and is not counted.
        for number in range(steps + 1):
            if number == 1:
                since = time.time()
            prompts = _prompts(request, 100 + number)
            done.append(await loop.step(prompts, profile.learning_rate.art))
            say("bare step", number, done[-1])
    return Measured.of_bare(request, done[1:], watch, since)


async def _proof(session: Any, request: TrainingRequest, service: Any) -> dict[str, Any]:
    from art.preprocessing.pack import packed_tensors_to_dir

    loop = _bare_loop(session, request)
    groups = await loop.roll_out(_prompts(request, 50))
    folders = []
    for shared in (True, False):
        session.backend._supports_result_packing = shared
        try:
            packed = session.backend._get_packed_tensors(
                session.model,
                groups,
                advantage_balance=0.0,
                allow_training_without_logprobs=False,
                scale_rewards=True,
                plot_tensors=False,
                packed_sequence_length=session._packed_length,
                logprob_calculation_chunk_size=1024,
            )
        finally:
            session.backend._supports_result_packing = True
        folders.append(packed_tensors_to_dir(packed, str(request.run_dir / f"proof-{shared}")))
    return cast(dict[str, Any], await service.compare(*folders))


def _prompts(request: TrainingRequest, batch: int) -> list[Prompt]:
    """Return the prompts of a batch; those of other batches where there are not as many."""
    size = request.profile.groups_per_step
    return [request.train[(batch * size + number) % len(request.train)] for number in range(size)]


class _measured_service:
    """Has the GPU backend start the bench's service, which the process that it moves to imports by its name."""

    def __enter__(self) -> None:
        from tasks.engines.gpu.backend import GpuBackend

        self._original = original = GpuBackend._get_service

        async def get(backend: Any, model: Any) -> Any:
            if model.name not in backend._services:
                # Unsloth comes with ART's package for this variable, before everything that it rewrites.
                os.environ["IMPORT_UNSLOTH"] = "1"
                from bench.gpu_service import MeasuredService
                from tasks.engines.gpu import service

                vars(service)["TellingService"] = MeasuredService
            return await original(backend, model)

        GpuBackend._get_service = get  # type: ignore[assignment, method-assign]

    def __exit__(self, *_: object) -> None:
        from tasks.engines.gpu.backend import GpuBackend

        GpuBackend._get_service = self._original  # type: ignore[method-assign]
