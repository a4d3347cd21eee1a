"""The bench's two ways through TRL, on a CPU: this project's loop, its verdicts taken for True, and a bare trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training_parts import request

from bench.gpu_measures import WARM_UP, Measured
from bench.gpu_trl import measure_trl
from bench.gpu_watch import GpuWatch
from tasks.engines.resume import journal_of
from tasks.engines.trl_engine import arguments

STEPS, BARE_STEPS = 11, 2
PROCESS = arguments.PROCESS


async def test_both_loops_are_measured_and_each_part_is_kept(tmp_path: Path, reward_server_url: str) -> None:
    settings: dict[str, Any] = {"groups_per_step": 2, "group_size": 2, "val_stories": 1, "eval_steps": 100}
    asked = request(
        tmp_path / "run", reward_server_url, engine="trl", max_steps=STEPS, trl={"micro_batch": 2}, **settings
    )
    found: dict[str, Any] = {"failed": {}}
    said: list[str] = []
    kept: list[tuple[set[str], int | None]] = []

    def say(*words: object) -> None:
        said.append(" ".join(map(str, words)))

    def keep() -> None:
        kept.append((set(found) & {"ours", "bare", "offline"}, found["ours"].steps if "ours" in found else None))

    def offline() -> dict[str, Any]:
        raise RuntimeError("no vLLM here")

    await measure_trl(asked, found, GpuWatch(), say, keep, steps=STEPS, bare_steps=BARE_STEPS, measure_offline=offline)
    assert found["failed"] == {"offline": "RuntimeError: no vLLM here"}
    ours, bare = found["ours"], found["bare"]
    assert isinstance(ours, Measured) and isinstance(bare, Measured)
    assert (ours.steps, bare.steps) == (STEPS - WARM_UP, BARE_STEPS)
    assert min(ours.steps_per_hour, bare.steps_per_hour, bare.rollout_tokens_per_s, bare.train_tokens_per_s) > 0
    assert found["wall_steps_per_hour"] > 0 and found["register_s"] > 0
    # A run that is cut off after ten steps has told of ten.
    assert kept == [
        ({"ours"}, 10 - WARM_UP),
        ({"ours"}, STEPS - WARM_UP),
        ({"ours"}, STEPS - WARM_UP),
        ({"ours", "bare"}, STEPS - WARM_UP),
    ]
    assert list(found["memory"]) == ["0", "5", "10", "11"]
    assert sum("ours step" in line for line in said) == 1 + STEPS
    assert sum("bare step" in line for line in said) == WARM_UP + BARE_STEPS
    rows = journal_of(asked.run_dir).rows()
    assert [rows[step]["train/matches"] for step in range(1, STEPS + 1)] == [1.0] * STEPS
    assert arguments.PROCESS == PROCESS
