"""What the tests of both engines on a GPU share: when they run, small trainings, and a look at the GPU."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tasks.engines import art_session
from tasks.engines.contract import TrainingRequest
from tasks.engines.gpu.failures import is_there
from tasks.engines.resume import journal_of
from tasks.starter.paths import BASE_MODEL
from tasks.titles.config import EngineName, load_profile
from tasks.titles.prepare import prepare_prompts

STORIES = ("train_stories=48", "val_stories=16", "test_stories=1")
LEFT_FREE = 2 * 2**20
"""Bytes; CUDA hands out no less at once."""


def needs(*packages: str) -> list[pytest.MarkDecorator]:
    """Return the marks of tests that need a GPU and these packages."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device"),
        pytest.mark.skipif(bool(missing), reason=f"not installed here: {', '.join(missing)}"),
    ]


class PlainTracker:
    """Keeps nothing: the run's directory holds all figures."""

    run_id = "no-tracker"

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def log_titles(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Do nothing."""

    def log_checkpoint(self, step: int, folder: Path, metrics: Mapping[str, float]) -> None:
        """Do nothing."""


def request(engine: EngineName, run_dir: Path, reward_model_url: str, *overrides: str) -> TrainingRequest:
    """Return a training of the starter model by the profile for GPUs, the same at every call."""
    profile = load_profile("starter-gpu", [f"engine={engine}", *STORIES, *overrides])
    prompts = prepare_prompts(profile, cache_dir=run_dir.parent / "cache")
    return TrainingRequest(
        profile=profile,
        run_name=run_dir.name,
        run_dir=run_dir,
        base_model=str(BASE_MODEL),
        train=prompts.train,
        val=prompts.val,
        reward_model_url=reward_model_url,
    )


def start_vllm_quickly() -> None:
    """Let ART's vLLM compile nothing: it is ready in half the time, and its answers are the same."""
    config_of = art_session.gpu_config

    def eager(*arguments: Any, **options: Any) -> Any:
        config = config_of(*arguments, **options)
        config["engine_args"]["enforce_eager"] = True
        return config

    art_session.gpu_config = eager


def rows_of(asked: TrainingRequest) -> dict[int, dict[str, float]]:
    """Return the metrics of the steps that a run has committed."""
    return journal_of(asked.run_dir).rows()


def pids_on_gpu() -> set[int]:
    """Return the ids of all processes that hold memory of a GPU."""
    query = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    return {int(line) for line in subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()}


def wait_until_gone(processes: set[psutil.Process], others_on_gpu: set[int], patience_s: float) -> list[str]:
    """Return the commands of those of `processes`, and the ids of new ones on the GPU, that are left after that time.

    `others_on_gpu` were there before; this process is none of them.
    """
    given_up = time.monotonic() + patience_s
    while True:
        left = [" ".join(process.cmdline()) for process in processes if is_there(process)]
        left += [f"process {pid} on the GPU" for pid in pids_on_gpu() - others_on_gpu - {psutil.Process().pid}]
        if not left or time.monotonic() > given_up:
            return left
        time.sleep(0.5)


class Hog:
    """Another user of the GPU, who takes all memory that there is and all that becomes free, until told to stop."""

    def __init__(self, since: Path | None = None) -> None:
        """Begin at once, or as soon as the file `since` is there."""
        self._since = since
        self._taken: list[torch.Tensor] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._take, daemon=True)

    def __enter__(self) -> Hog:
        # CUDA starts here: it did not, for a minute, beside a process that kept asking for the free memory.
        torch.cuda.mem_get_info()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._taken.clear()
        torch.cuda.empty_cache()

    def _take(self) -> None:
        while not self._stopped.is_set():
            if self._since is not None and not self._since.exists():
                self._stopped.wait(0.005)
                continue
            free, _ = torch.cuda.mem_get_info()
            try:
                if free > LEFT_FREE:
                    self._taken.append(torch.empty(free - LEFT_FREE, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:  # somebody else was faster
                pass
            self._stopped.wait(0.005)


def show(name: str, figures: object) -> None:
    """Write figures for the reader of the test's output (`-s`)."""
    sys.stdout.write(f"\nFIGURES {name}: {json.dumps(figures, default=str)}\n")
    sys.stdout.flush()


def show_log() -> None:
    """Write this project's log to standard error, also in a process without pytest."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "httpcore", "openai"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
