"""The flow's side of a training with TRL: starts the trainer's process, follows it, and ends it whatever happens.

The process commits steps to the run's directory; this side reads them there and tells MLflow and whoever
watches. So MLflow has one writer, and a step that was committed is told even where the process died after it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
from collections.abc import Iterable
from pathlib import Path

from tasks.engines.checkpoints import latest_complete
from tasks.engines.context import context_tokens
from tasks.engines.contract import ProgressListener, RunTracker, TrainingRequest, TrainingResult
from tasks.engines.device import full_memory_in_log
from tasks.engines.ledger import check_start, finish, tell, tell_all
from tasks.engines.resume import checkpoints_folder, engine_folder, journal_of, prepare_to_continue, stored_state
from tasks.engines.trl_engine.arguments import check_trl_settings, launch_command, trainer_environment
from tasks.engines.trl_engine.request_file import API_KEY, write_request
from tasks.engines.trl_engine.vllm_server import open_vllm_server
from tasks.titles import errors
from tasks.titles.child_process import ChildProcess
from tasks.titles.config import Settings
from tasks.titles.errors import HnTitlesError, OutOfMemory, RunStopped

logger = logging.getLogger(__name__)
trainer_logger = logging.getLogger(f"{__name__}.trainer")

LOG = "trainer.log"
VLLM_SERVER_URL = "VLLM_SERVER_URL"
"""The variable of the trainer's environment that tells it where vLLM's server is."""
FAILURE = "failure.json"
"""Where the trainer's process says why it stopped, in the engine's folder: `{"error": class name, "message": …}`."""
_POLL_S = 0.25
_LOG_LINES = 20
# As `process.main` has it written.
_OWN_LINE = re.compile(r"\S+ \S+ (DEBUG|INFO|WARNING|ERROR|CRITICAL) ([\w.]+): (.*)")


async def train(
    request: TrainingRequest, *, tracker: RunTracker, on_progress: ProgressListener | None = None
) -> TrainingResult:
    """Train up to `max_steps` in a process of its own, from the last complete checkpoint on where there is one.

    Raises what stopped the training there (`RunStopped` and the others of the tree), and `RunStopped` or
    `OutOfMemory` with the end of its log where the process died; everything up to the last committed step is kept.
    """
    profile = request.profile
    check_trl_settings(profile, vllm_server_url=Settings().vllm_server_url)
    context_tokens(request.base_model, profile)
    state = prepare_to_continue(request)
    check_start(request, state, tracker)
    tell_all(request, tracker)
    if state is None or state.cursor.step < profile.max_steps:
        told = state.cursor.step if state else -1
        async with open_vllm_server(profile, request.base_model, request.run_dir) as url:
            await _follow(request, tracker, on_progress, told, url)
        state = stored_state(request.run_dir, "trl")
    if state is None or state.cursor.step < profile.max_steps:
        raise RunStopped(
            f"The trainer's process ended without an error at step {state.cursor.step if state else None} of "
            f"{profile.max_steps}. Look at {request.run_dir / LOG}; the same command continues."
        )
    return finish(request, tracker, state)


async def _follow(
    request: TrainingRequest,
    tracker: RunTracker,
    on_progress: ProgressListener | None,
    told: int,
    vllm_server_url: str | None,
) -> None:
    """Run the process to its end and tell of every step after `told` as soon as it is committed."""
    folder = engine_folder(request.run_dir, "trl")
    (folder / FAILURE).unlink(missing_ok=True)
    path = write_request(request, folder)
    environment = {**os.environ, **trainer_environment(request.profile)}
    # Set even where there is no key: it outranks one in `.env`.
    environment[API_KEY] = request.reward_model_api_key or ""
    if request.profile.trl.unsloth:
        # It writes the classes that it generates to a folder of the working directory.
        environment["UNSLOTH_COMPILE_LOCATION"] = str(folder / "unsloth")
    if vllm_server_url is not None:
        environment[VLLM_SERVER_URL] = vllm_server_url
    child = ChildProcess(
        [*launch_command(request.profile, path, Settings().trl_python), tracker.run_id],
        log_path=request.run_dir / LOG,
        environment=environment,
    )
    logger.info("TRL's trainer runs as process %d, log in %s", child.pid, request.run_dir / LOG)
    try:
        while True:
            code = child.poll()
            pass_on(child.new_lines())
            told = _tell_after(told, request, tracker, on_progress)
            if code is not None:
                break
            await asyncio.sleep(_POLL_S)
    finally:
        await asyncio.shield(asyncio.to_thread(child.stop))
    if code != 0:
        raise _failure(code, folder / FAILURE, child.log_end(_LOG_LINES))


def _tell_after(told: int, request: TrainingRequest, tracker: RunTracker, on_progress: ProgressListener | None) -> int:
    committed = latest_complete(checkpoints_folder(request.run_dir, "trl"))
    if committed is None or committed <= told:
        return told
    rows = journal_of(request.run_dir).rows()
    for step in range(told + 1, committed + 1):
        progress = tell(request, tracker, step, rows[step])
        if on_progress is not None:
            on_progress(progress)
    return committed


def pass_on(lines: Iterable[str]) -> None:
    """Log what the trainer's process wrote, so that it is also seen where this process's log is."""
    for line in lines:
        own = _OWN_LINE.fullmatch(line)
        if own:
            trainer_logger.log(logging.getLevelNamesMapping()[own[1]], "%s: %s", own[2], own[3])
        else:
            trainer_logger.info("%s", line)


def _failure(code: int, file: Path, log_end: str) -> HnTitlesError:
    """Return the error that the process left, or one of what is known of its death."""
    try:
        left = json.loads(file.read_text(encoding="utf-8"))
        kind = getattr(errors, left["error"])
        return kind(left["message"])  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError, AttributeError):
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        full = full_memory_in_log(log_end)
        if full is not None:
            return OutOfMemory(f"{full} TRL's trainer {how}.{log_end}")
        return RunStopped(f"TRL's trainer {how}; the same command continues from the last checkpoint.{log_end}")
