"""TRL's trainer process as the bench needs it: `python -m bench.gpu_trl_process REQUEST RUN_ID`.

The validator is asked, and its verdict is taken for True: random weights know neither True nor False. After each
step a line tells what memory it took.
"""

from __future__ import annotations

import sys
from typing import Any

from bench.gpu_memory import tell
from tasks.engines.trl_engine import process
from tasks.engines.trl_engine.steps import StepCallback
from tasks.engines.trl_engine.validator import LocalValidator, Verdict


def take_every_verdict() -> None:
    """Read True from whatever the validator answers."""
    LocalValidator._read = lambda _, logits: Verdict(True, 1.0, 0.0)  # type: ignore[assignment, method-assign]


def tell_memory() -> None:
    """Have each step write a line before it is committed."""
    commit = StepCallback._commit

    def tell_and_commit(callback: Any, state: Any, *arguments: Any) -> None:
        tell(callback._request.run_dir, state.cursor.step)
        commit(callback, state, *arguments)

    StepCallback._commit = tell_and_commit  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    take_every_verdict()
    tell_memory()
    sys.exit(process.main(*sys.argv[1:]))
