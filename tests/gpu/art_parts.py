"""Sittings of ART's engine on a GPU, and what is done to them.

python art_parts.py RUN_DIR REWARD_MODEL_URL   continues a training to step 3 and kills itself among the next
                                               step's rollouts; writes the ids of the processes it had started
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from gpu_parts import Hog, PlainTracker, request, show, show_log, start_vllm_quickly
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tasks.engines.art_loop import map_plainly, train
from tasks.engines.art_session import BASE_MODEL_NAME, ArtSession, open_session
from tasks.engines.contract import GroupRollout, TrainingRequest
from tasks.engines.gpu.failures import family
from tasks.engines.resume import adapter_folder
from tasks.engines.training_state import TrainingState
from tasks.titles.story import Prompt

Act = Callable[["Sitting", ArtSession], Awaitable[None]]
STEPS = 4
STARTED = "started.json"
SITTING_S = 300.0
"""Time that a sitting has, vLLM's start included."""
LEARNING_RATE = 1.5e-2
"""One update moves log-probabilities by some 0.1 nats on average, many times what bfloat16 leaves unsure."""


class Sitting:
    """One opening of the engine, from its start to its end, and what was seen in it."""

    def __init__(self, asked: TrainingRequest) -> None:
        self.asked = asked
        self.state: TrainingState | None = None
        """That it began from."""
        self.stories: dict[int, list[str]] = {}
        """The stories that a step drew."""
        self.seen: dict[str, Any] = {}
        self.processes: set[psutil.Process] = set()
        """All that it had started."""
        self.ended: Exception | None = None
        self.seconds_to_end = 0.0
        """From `kill_server` to the end of everything."""

    async def sit(self, acts: Mapping[int, Act]) -> None:
        """Train until an error; `acts[step]` comes before that step's rollouts."""
        started = time.monotonic()

        async def map_groups(rollout: GroupRollout, prompts: Sequence[Prompt], step: int) -> list[Any]:
            self.stories[step] = [prompt.story.id for prompt in prompts]
            if step in acts:
                await acts[step](self, session)
            return await map_plainly(rollout, prompts, step)

        try:
            async with asyncio.timeout(SITTING_S), open_session(self.asked) as (session, self.state):
                self.seen["opened_s"] = round(time.monotonic() - started, 1)
                show("ART opened, seconds", self.seen["opened_s"])
                service = await session.backend._get_service(session.model)
                self.processes = family(vars(service)["_process"].pid)
                await train(
                    self.asked, session=session, state=self.state, tracker=PlainTracker(), map_groups=map_groups
                )
        except Exception as error:
            self.ended = error
        self.seconds_to_end = time.monotonic() - self.seen.pop("killed_at", time.monotonic())
        figures = {name: seen for name, seen in self.seen.items() if isinstance(seen, float)}
        show("ART sitting", {"ended": repr(self.ended)[:3000], "seconds_to_end": self.seconds_to_end, **figures})


async def compare_weights(sitting: Sitting, session: ArtSession) -> None:
    """Ask the server, the trainer and the files of the last two checkpoints for log-probabilities of one title."""
    client, ids, last = session.model.openai_client(), session._canary, session.step
    served = {"base": BASE_MODEL_NAME, **{step: await session.model_name(step) for step in (last, last - 1)}}
    for who, name in served.items():
        answer = await client.completions.create(
            model=name, prompt=ids, echo=True, logprobs=1, max_tokens=1, temperature=0
        )
        sitting.seen[f"server {who}"] = answer.choices[0].logprobs.token_logprobs[1 : len(ids)]
        folder = None if who == "base" else adapter_folder(sitting.asked.run_dir, "art", int(who))
        sitting.seen[f"files {who}"] = logprobs_of_files(sitting.asked.base_model, folder, ids)
    sitting.seen[f"trainer {last}"] = await session.backend.trainer_logprobs(session.model, ids)


@torch.no_grad()
def logprobs_of_files(base_model: str, adapter: Path | None, ids: list[int]) -> list[float]:
    """Return log p(token | tokens before it) of transformers and PEFT on the CPU, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    logits = model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()


async def kill_server(sitting: Sitting, session: ArtSession) -> None:
    """Kill vLLM's server as soon as it writes titles."""
    (server,) = next(one for one in sitting.processes if "managed_process" in " ".join(one.cmdline())).children()

    async def kill() -> None:
        await writing(session)
        sitting.seen["killed_at"] = time.monotonic()
        server.kill()

    sitting.seen["killing"] = asyncio.create_task(kill())


async def writing(session: ArtSession) -> None:
    """Return as soon as the server writes titles."""
    async with httpx.AsyncClient(trust_env=False) as client:
        while True:
            metrics = (await client.get(session.base_url.removesuffix("/v1") + "/metrics")).text
            if any(float(number) for number in re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", metrics, re.M)):
                return
            await asyncio.sleep(0.01)


async def fill_memory(sitting: Sitting, session: ArtSession) -> None:
    """Let somebody else take the GPU's memory as soon as the step's update begins."""
    update = session.train

    async def update_without_memory(*arguments: Any, **options: Any) -> Any:
        with Hog():
            return await update(*arguments, **options)

    session.train = update_without_memory  # type: ignore[method-assign]


async def die(sitting: Sitting, session: ArtSession) -> None:
    """Kill this process, and no other, as soon as the server writes titles."""
    started = sitting.asked.run_dir / STARTED
    started.write_text(json.dumps([process.pid for process in sitting.processes]))

    async def kill() -> None:
        await writing(session)
        os.kill(os.getpid(), signal.SIGKILL)

    sitting.seen["killing"] = asyncio.create_task(kill())


def art_request(run_dir: Path, reward_model_url: str, *overrides: str) -> TrainingRequest:
    """Return the training that all sittings continue, or with `overrides` one like it."""
    settings = (f"max_steps={STEPS}", "groups_per_step=4", "updates_per_step=one", f"learning_rate.art={LEARNING_RATE}")
    return request("art", run_dir, reward_model_url, *settings, *overrides)


if __name__ == "__main__":
    show_log()
    start_vllm_quickly()
    asyncio.run(Sitting(art_request(Path(sys.argv[1]), sys.argv[2])).sit({STEPS: die}))
