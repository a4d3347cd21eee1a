"""Full memory on a GPU, as the trainer's process tells it to the flow; `tests/gpu` fills a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_parts import request

from tasks.engines.resume import engine_folder
from tasks.engines.trl_engine import launch, process
from tasks.engines.trl_engine.request_file import write_request
from tasks.titles.errors import OutOfMemory, RunStopped


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), OutOfMemory),
        (AssertionError("Memory usage increased after sleeping."), OutOfMemory),
        (RuntimeError("an illegal memory access"), None),
    ],
)
def test_the_trainer_tells_of_full_memory_and_of_no_other_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, told: type[RunStopped] | None
) -> None:
    asked = request(tmp_path / "run", "http://127.0.0.1:9", engine="trl")
    folder = engine_folder(asked.run_dir, "trl")
    folder.mkdir(parents=True)

    def train(*_: Any) -> None:
        raise raised

    monkeypatch.setattr("tasks.engines.trl_engine.trainer.train", train)
    monkeypatch.setattr(process, "end_with_stdin", lambda: None)
    path = write_request(asked, folder)
    if told is None:
        with pytest.raises(RuntimeError, match="illegal"):
            process.main(str(path), "run")
        assert not (folder / launch.FAILURE).exists()
        return
    assert process.main(str(path), "run") == told.exit_code
    failure = launch._failure(told.exit_code, folder / launch.FAILURE, "")
    assert type(failure) is told and str(raised) in str(failure)


@pytest.mark.parametrize(
    ("last", "told"),
    [
        ("[rank0]: AssertionError: Memory usage increased after sleeping.", OutOfMemory),
        ("[rank0]: AssertionError", RunStopped),
    ],
)
def test_a_process_that_left_no_reason_is_told_by_its_log(tmp_path: Path, last: str, told: type[RunStopped]) -> None:
    failure = launch._failure(1, tmp_path / launch.FAILURE, f"\nThe end of trainer.log:\n{last}")
    assert type(failure) is told
    assert "TRL's trainer ended with exit code 1" in str(failure) and str(failure).endswith(last)
    assert "same command continues from the last checkpoint" in str(failure)
