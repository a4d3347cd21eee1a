"""What the tests of continued runs share: deaths at a given moment, and what makes two runs the same."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from training_parts import tracking_uri

from tasks.engines import ledger
from tasks.engines.resume import adapter_folder, journal_of, stored_state
from tasks.titles.config import EngineName

# Sampling and training are seeded per title and per step, so both runs do the same arithmetic. What may differ
# is which requests the servers happen to compute in one batch, and with it the order of float32 sums: some 1e-6
# per log-probability and score. Ten steps carry that on into the metrics; Adam divides a gradient by its own
# size and so makes more of it in single weights.
METRIC_TOLERANCE, WEIGHT_TOLERANCE = 1e-4, 1e-3


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment: str, at: int) -> None:
    """Have this process kill itself at the commit of step `at`.

    Moments: `row` (the checkpoint's folder and its row in the journal are there, its mark is not), `committed`
    (the mark is there, MLflow has not been told).
    """
    commit = ledger.commit_checkpoint

    def commit_or_die(folder: Path, cursor: dict[str, Any]) -> None:
        if (moment, at) == ("row", cursor["step"]):
            die()
        commit(folder, cursor)
        if (moment, at) == ("committed", cursor["step"]):
            die()

    ledger.commit_checkpoint = commit_or_die  # type: ignore[assignment]


def assert_same_runs(one: Path, other: Path, engine: EngineName, steps: int) -> None:
    """Assert that two runs of `steps` steps have the same metrics, cursor and weights."""
    rows, others = journal_of(one).rows(), journal_of(other).rows()
    assert sorted(rows) == sorted(others) == list(range(steps + 1))
    for step, row in without_times(rows).items():
        same = pytest.approx(row, rel=METRIC_TOLERANCE, abs=METRIC_TOLERANCE)
        assert without_times(others)[step] == same, f"step {step}"
    assert _cursor(one, engine) == _cursor(other, engine)
    assert_same_weights(adapter_folder(one, engine, steps), adapter_folder(other, engine, steps))


def without_times(rows: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    clocks = ("time/", "throughput/", "canary/")
    return {step: {n: v for n, v in row.items() if not n.startswith(clocks)} for step, row in rows.items()}


def _cursor(run_dir: Path, engine: EngineName) -> Any:
    state = stored_state(run_dir, engine)
    assert state is not None
    return state.cursor, state.best_step, state.trajectories_dropped


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the adapter of a checkpoint's folder, by name."""
    return load_file(folder / "adapter_model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    """Compare the adapters and the optimisers' states of two checkpoints' folders."""
    for left, right in (
        (weights(one), weights(other)),
        (load_file(one / "optimizer.safetensors"), load_file(other / "optimizer.safetensors")),
    ):
        assert left.keys() == right.keys()
        for key, values in left.items():
            difference = (values.float() - right[key].float()).abs().max().item()
            assert difference < WEIGHT_TOLERANCE, key


def assert_mlflow_has_each_metric_once(run_dir: Path, engine: EngineName) -> None:
    state = stored_state(run_dir, engine)
    assert state is not None
    client = MlflowClient(tracking_uri=tracking_uri(run_dir))
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert [run.info.run_id for run in runs] == [state.mlflow_run_id]
    assert runs[0].info.status == "FINISHED"
    rows = journal_of(run_dir).rows()
    for name in {name for row in rows.values() for name in row}:
        wanted = [(step, row[name]) for step, row in sorted(rows.items()) if name in row]
        stored = [(entry.step, entry.value) for entry in client.get_metric_history(state.mlflow_run_id, name)]
        assert sorted(stored) == wanted, name
