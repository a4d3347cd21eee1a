"""One sitting of a reward model training in a process of its own, which may kill itself without warning.

    python reward_train_and_die.py FOLDER [MOMENT STEP]

Moments: `logged` (MLflow has the step's metrics), `written` (a checkpoint's files are there, its mark is not).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from reward_training_parts import reward_run, train

from tasks.reward_training import trainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, moment: str = "", at: str = "-1") -> None:
    mark = trainer.mark_complete

    def mark_or_die(checkpoints: Path, step: int, stories: str) -> None:
        if (moment, int(at)) == ("written", step):
            die()
        mark(checkpoints, step, stories)

    def on_progress(stage: str, done: int, total: int, note: str = "") -> None:
        # The progress of a step is told before its metrics are stored: the next step's says that they are.
        if (moment, stage, int(at)) == ("logged", "training", done - 1):
            die()

    trainer.mark_complete = mark_or_die
    run: Any = reward_run(folder)
    train(run, on_progress)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
