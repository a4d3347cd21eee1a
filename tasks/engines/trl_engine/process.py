"""The trainer's process: `python -m tasks.engines.trl_engine.process REQUEST MLFLOW_RUN_ID`, once per device."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from tasks.engines.device import out_of_memory
from tasks.engines.resume import engine_folder
from tasks.engines.trl_engine.launch import FAILURE
from tasks.engines.trl_engine.request_file import read_request
from tasks.titles.child_process import end_with_stdin
from tasks.titles.errors import HnTitlesError
from tasks.titles.run_directory import write_json


def main(request_path: str, mlflow_run_id: str) -> int:
    """Train as the request says; leave the reason where training stops itself, and return the exit code."""
    end_with_stdin()
    # `accelerate launch` numbers the processes; the others go through what the first one tells of.
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    request = read_request(Path(request_path))
    if request.profile.trl.unsloth:
        # It rewrites classes of transformers and TRL, and must come before whoever imports them.
        import unsloth  # noqa: F401
    try:
        from tasks.engines.trl_engine.trainer import train

        train(request, mlflow_run_id)
    except Exception as error:
        stopped = error if isinstance(error, HnTitlesError) else out_of_memory(error)
        if stopped is None:
            raise
        logging.getLogger(__name__).error("%s", stopped)
        reason = {"error": type(stopped).__name__, "message": str(stopped)}
        write_json(engine_folder(request.run_dir, "trl") / FAILURE, reason)
        return stopped.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
