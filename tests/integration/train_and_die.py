"""One sitting of a training with ART in a process of its own, which may kill itself without warning.

    python train_and_die.py RUN_DIR REWARD_MODEL_URL MAX_STEPS [MOMENT STEP]

Moments: `rollouts` (while titles are in the making), and those of `resume_parts.die_at`. The stories of every
step go to RUN_DIR/seen.jsonl.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resume_parts import die, die_at
from training_parts import open_tracker, request

from tasks.engines import art_loop
from tasks.engines.art_session import open_session
from tasks.engines.contract import GroupRollout, TrainingRequest
from tasks.titles.story import Prompt


async def sit(asked: TrainingRequest, moment: str = "", at: int = -1) -> None:
    tracker = open_tracker(asked)

    async def map_groups(rollout: GroupRollout, prompts: Sequence[Prompt], step: int) -> list[Any]:
        with (asked.run_dir / "seen.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "stories": [prompt.story.id for prompt in prompts]}) + "\n")
        if (moment, at) == ("rollouts", step):
            asyncio.get_running_loop().call_later(0.05, die)
        return await art_loop.map_plainly(rollout, prompts, step)

    async with open_session(asked) as (session, resumed):
        result = await art_loop.train(asked, session=session, state=resumed, tracker=tracker, map_groups=map_groups)
    tracker.finish("FINISHED")
    sys.stdout.write(json.dumps({"steps": result.steps, "best_step": result.best_step}) + "\n")


if __name__ == "__main__":
    run_dir, url, steps, *death = sys.argv[1:]
    moment, at = (death[0], int(death[1])) if death else ("", -1)
    die_at(moment, at)
    asyncio.run(sit(request(Path(run_dir), url, max_steps=int(steps), eval_steps=3), moment, at))
