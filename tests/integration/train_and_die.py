"""One sitting of a training in a process of its own, which may kill itself without warning at a given moment.

    python train_and_die.py RUN_DIR REWARD_MODEL_URL MAX_STEPS [MOMENT STEP]

Moments: `rollouts` (while titles are in the making), `row` (the checkpoint's folder and its row in the journal
are there, its mark is not), `committed` (the mark is there, MLflow has not been told). The stories of every
step go to RUN_DIR/seen.jsonl.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training_parts import request

from tasks.engines import art_loop
from tasks.engines.art_resume import stored_state
from tasks.engines.art_session import open_session
from tasks.engines.contract import GroupRollout, TrainingRequest
from tasks.engines.tracker import MlflowTracker
from tasks.titles.story import Prompt


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def sit(asked: TrainingRequest, moment: str = "", at: int = -1) -> None:
    state = stored_state(asked.run_dir)
    tracker = MlflowTracker.open(
        asked.profile,
        run_name=asked.run_name,
        tracking_uri=f"sqlite:///{asked.run_dir}/mlflow.db",
        resume_run_id=state.mlflow_run_id if state else None,
    )

    async def map_groups(rollout: GroupRollout, prompts: Sequence[Prompt], step: int) -> list[Any]:
        with (asked.run_dir / "seen.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "stories": [prompt.story.id for prompt in prompts]}) + "\n")
        if (moment, at) == ("rollouts", step):
            asyncio.get_running_loop().call_later(0.05, die)
        return await art_loop.map_plainly(rollout, prompts, step)

    async with open_session(asked) as (session, resumed):
        _die_at(moment, at, tracker)
        result = await art_loop.train(asked, session=session, state=resumed, tracker=tracker, map_groups=map_groups)
    tracker.finish("FINISHED")
    sys.stdout.write(json.dumps({"steps": result.steps, "best_step": result.best_step}) + "\n")


def _die_at(moment: str, at: int, tracker: MlflowTracker) -> None:
    """Put a death before the real thing, at one moment of one step."""
    commit, log_metrics = art_loop.commit_checkpoint, tracker.log_metrics

    def commit_or_die(folder: Path, cursor: dict[str, Any]) -> None:
        if (moment, at) == ("row", cursor["step"]):
            die()
        commit(folder, cursor)

    def log_or_die(step: int, metrics: dict[str, float]) -> None:
        if (moment, at) == ("committed", step):
            die()
        log_metrics(step, metrics)

    art_loop.commit_checkpoint = commit_or_die  # type: ignore[assignment]
    tracker.log_metrics = log_or_die  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    run_dir, url, steps, *death = sys.argv[1:]
    asked = request(Path(run_dir), url, max_steps=int(steps), eval_steps=3)
    asyncio.run(sit(asked, *([death[0], int(death[1])] if death else [])))
