"""TRL's trainer process, which kills itself without warning at the commit of a step.

    python trl_process_and_die.py MOMENT STEP REQUEST MLFLOW_RUN_ID

Moments are those of `resume_parts.die_at`.
"""

from __future__ import annotations

import sys

from resume_parts import die_at

from tasks.engines.trl_engine import process

if __name__ == "__main__":
    moment, step, *arguments = sys.argv[1:]
    die_at(moment, int(step))
    sys.exit(process.main(*arguments))
