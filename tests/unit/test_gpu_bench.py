"""What the bench of training makes of its figures; what it measures needs a GPU."""

from __future__ import annotations

import argparse
import json
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import write
from bench.gpu_measures import Measured, do_parts, rates
from bench.gpu_watch import GpuWatch

KEYS = [
    "engine",
    "model",
    "device",
    "steps_per_hour",
    "bare_steps_per_hour",
    "rollout_tokens_per_s",
    "vllm_offline_tokens_per_s",
    "train_tokens_per_s",
    "gpu_busy",
    "peak_memory_gb",
]


def figures(steps_per_hour: float) -> Measured:
    return Measured(6, steps_per_hour, 100.0, 20.0, 900.0, 80.0, 0.5, 40.0, {"train_s": 2.0})


def options(engine: str, out: Path) -> argparse.Namespace:
    return argparse.Namespace(engine=engine, name=None, base_model="/models/half", out=out)


def test_an_entry_has_the_keys_of_every_entry_and_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    found = {"device": "H", "failed": {}, "ours": figures(1000.0), "bare": figures(100.0)}
    write(options("art", out), found)
    write(options("trl", out), {"device": "H", "failed": {}, "ours": figures(2000.0), "bare": figures(1900.0)})
    write(options("art", out), found | {"offline": {"tokens_per_s": [3.0, 1.0, 2.0]}})
    trl, art = json.loads(out.read_text())
    assert list(art)[: len(KEYS)] == list(trl)[: len(KEYS)] == KEYS
    assert (art["engine"], art["steps_per_hour"], art["vllm_offline_tokens_per_s"]) == ("art", 1000.0, 2.0)
    assert (trl["engine"], trl["bare_steps_per_hour"], trl["vllm_offline_tokens_per_s"]) == ("trl", 1900.0, None)
    assert trl["art_bare_steps_per_hour"] == 100.0
    assert art["ours"]["split"] == {"train_s": 2.0}


def test_an_entry_of_a_run_that_broke_off_says_so(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    write(options("art", out), {"device": "H", "failed": {"bare": "RuntimeError: gone"}})
    (entry,) = json.loads(out.read_text())
    assert entry["steps_per_hour"] is None and entry["failed"] == {"bare": "RuntimeError: gone"}


async def test_a_part_that_fails_is_told_and_the_next_is_measured() -> None:
    found: dict[str, Any] = {"failed": {}}
    said: list[tuple[object, ...]] = []
    kept: list[dict[str, Any]] = []

    async def offline() -> None:
        raise RuntimeError("no memory")

    async def bare() -> None:
        found["bare"] = 78.5

    await do_parts(
        {"offline": offline, "bare": bare},
        found,
        lambda *words: said.append(words),
        lambda: kept.append(deepcopy(found)),
    )
    assert said == [("offline", "FAILED:", "RuntimeError: no memory")]
    assert kept == [
        {"failed": {"offline": "RuntimeError: no memory"}},
        {"failed": {"offline": "RuntimeError: no memory"}, "bare": 78.5},
    ]


def test_what_is_shown_of_a_step() -> None:
    row = {"time/train_s": 1.23456, "time/sleep_s": 0.1, "train/reward": 2.0, "train/length": 9.0}
    assert rates(row) == {"train_s": 1.235, "sleep_s": 0.1, "reward": 2.0}


def test_the_watch_asks_nvidia_smi_for_all_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '1000, 50'\necho '2000, 100'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    started = time.time()
    with GpuWatch() as watch:
        while not watch.rows and time.time() < started + 20:
            time.sleep(0.05)
    assert watch.busy(started, time.time()) == 0.75
    assert watch.peak_gb(started, time.time()) == pytest.approx(3000 * 2**20 / 1e9, abs=0.01)
    assert watch.busy(0, 1) is None and watch.peak_gb(0, 1) is None
