"""TRL's trainer process whose update begins when the GPU is full: `python -m trl_full_update REQUEST RUN_ID`.

It says when it is about to begin, with vLLM asleep and all titles judged, and waits until somebody has taken the
memory.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from tasks.engines.trl_engine import process
from tasks.engines.trl_engine.request_file import read_request

BEGINS = "update-begins"
"""A file of the run's folder."""
_FULL, _PATIENCE_S = 8 * 2**20, 60.0
"""Bytes that are free of a full GPU at most; the time that somebody has to fill it."""


def begin_without_memory(run_dir: Path) -> None:
    """Have an update leave the GPU all that it does not hold, and begin after that has gone."""
    from trl import GRPOTrainer

    compute_loss = GRPOTrainer.compute_loss

    def without_memory(trainer: Any, *arguments: Any, **options: Any) -> Any:
        torch.cuda.empty_cache()
        (run_dir / BEGINS).touch()
        given_up = time.monotonic() + _PATIENCE_S
        while torch.cuda.mem_get_info()[0] > _FULL and time.monotonic() < given_up:
            time.sleep(0.1)
        return compute_loss(trainer, *arguments, **options)

    GRPOTrainer.compute_loss = without_memory


if __name__ == "__main__":
    begin_without_memory(read_request(Path(sys.argv[1])).run_dir)
    sys.exit(process.main(*sys.argv[1:]))
