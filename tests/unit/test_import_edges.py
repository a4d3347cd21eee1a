"""Plain rooms stay light: each module is imported in a fresh process, and what came along is looked at."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import pytest

import tasks.report
import tasks.titles

HEAVY = {"torch", "prefect", "mlflow", "transformers", "datasets", "trl", "art", "unsloth", "vllm"}
MODULES = [
    *sorted(
        f"{room.__name__}.{module.name}"
        for room in (tasks.report, tasks.titles)
        for module in pkgutil.iter_modules(room.__path__)
    ),
    # The flow reads these to start a trainer that imports everything in a process of its own.
    "tasks.engines.trl_engine.arguments",
    "tasks.engines.trl_engine.request_file",
    # The command line opens a run before anything heavy is imported.
    "tasks.reward_training.report",
    "tasks.reward_training.runs",
]


def imported_with(modules: list[str]) -> set[str]:
    """The top-level packages in a fresh process after importing `modules`."""
    code = (
        "import importlib, json, sys\n"
        "for name in json.loads(sys.argv[1]): importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    command = [sys.executable, "-c", code, json.dumps(modules)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_there_are_modules_to_look_at() -> None:
    assert {"tasks.report.page", "tasks.titles.config", "tasks.titles.prepare", "tasks.titles.sources"} <= set(MODULES)


def test_a_heavy_import_would_be_seen() -> None:
    assert "transformers" in imported_with(["transformers"])


def test_plain_rooms_import_nothing_heavy() -> None:
    together = imported_with(MODULES)
    if not together & HEAVY:
        return
    guilty = {module: sorted(imported_with([module]) & HEAVY) for module in MODULES}
    pytest.fail(f"heavy imports at module level: { {module: names for module, names in guilty.items() if names} }")
