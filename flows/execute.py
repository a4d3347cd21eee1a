"""Runs a flow for the command line: a Prefect server where none is configured, bars, a log, and what to do next."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.titles.errors import HnTitlesError

if TYPE_CHECKING:
    from rich.console import Console

    from flows.prefect_server import PrefectApi
    from tasks.titles.run_directory import RunDirectory

Flow = Callable[[], Coroutine[Any, Any, Any]]

STAGES = {
    "prefect": "Prefect",
    "stories": "stories",
    "reward server": "reward server",
    "tokens": "stories encoded",
    "training": "training steps",
    "figures": "passes for figures",
    "judges": "judges",
    "evaluation": "test stories",
    "runs": "runs trained",
}
"""How each stage is called on the screen."""

ENVIRONMENT = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_COLORS": "false",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "tasks",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_CLI_PROMPT": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "true",
    # Policy and reward model compute at the same time; threads that spin while they wait take the cores from the
    # other (on two cores a step's rollouts took 6.2 s spinning, 3.6 s sleeping).
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""What libraries read while they are imported: no usage reports, no progress bars, no busy waiting."""


def execute(
    run_directory: RunDirectory, verb: str, job: Callable[[], Flow], show: Callable[[Console, RunDirectory, Any], None]
) -> None:
    """Run a flow with bars on the terminal and everything else in the run's log, then show what came of it.

    `verb` says what is done to the run; `job` imports the flow and returns it ready to be called.
    """
    from prefect.exceptions import TerminationSignal

    from flows.prefect_server import prefect_api
    from flows.progress import watched_by
    from flows.terminal import Bars, output_to
    from tasks.titles.config import Settings

    # A termination is an interruption: whatever was started is stopped in either case.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    prepare_environment()
    with output_to(run_directory.log_path) as (out, screen):
        screen.print(f"{verb} run {run_directory.name} in {run_directory.path}", soft_wrap=True)
        try:
            with (
                prefect_api(run_directory.path / "prefect_server.log", Settings().prefect_api_url) as api,
                Bars(screen, STAGES) as bars,
                watched_by(bars),
            ):
                bars("prefect", 0, None, "")
                # Prefect's server starts while this process imports what the flow needs.
                flow = job()
                api.wait_ready()
                bars("prefect", 1, 1, api.ui_url)
                result = asyncio.run(flow())
        except (KeyboardInterrupt, asyncio.CancelledError, TerminationSignal):
            # Prefect puts a handler of its own for SIGTERM in the place of this one while a flow runs.
            but = " (without --fresh)" if "--fresh" in sys.argv else ""
            screen.print(
                f"\nInterrupted. Run {run_directory.name} continues with the same command{but}.", soft_wrap=True
            )
            raise KeyboardInterrupt from None
        except Exception as error:
            if not isinstance(error, HnTitlesError):
                traceback.print_exc()
            screen.print(f"Log: {run_directory.log_path}", soft_wrap=True)
            raise
        show(out, run_directory, result)
        _show_where(out, run_directory, api)
        results = (run_directory.report_page, run_directory.summary_path)
        last = next((path for path in results if path.exists()), run_directory.path)
        out.print(str(last), soft_wrap=True)


def verb_of(run_directory: RunDirectory) -> str:
    """Return what is about to be done to a run, for the screen."""
    return "Continuing" if run_directory.resumed else "Starting"


def _show_where(out: Console, run_directory: RunDirectory, api: PrefectApi) -> None:
    """Print the commands that open Prefect and MLflow on this run, and the pages to look at."""
    from tasks.titles.config import Settings
    from tasks.tracking import MLFLOW_UI, mlflow_command, mlflow_page

    uri = Settings().tracking_uri
    page = mlflow_page(run_directory.record())
    prefect = f"{program('prefect')} server start   then http://127.0.0.1:4200/runs" if api.own else api.ui_url
    if uri.startswith("sqlite"):
        mlflow = f"{mlflow_command(uri).replace('mlflow', program('mlflow'), 1)}   then {MLFLOW_UI}/{page}"
    else:
        mlflow = f"{uri.rstrip('/')}/{page}"
    out.print(f"See it in Prefect: {prefect}", soft_wrap=True)
    out.print(f"See it in MLflow:  {mlflow}", soft_wrap=True)


def program(name: str) -> str:
    """Return how a program of this environment is called from here: by name where PATH finds this very one."""
    own = Path(sys.executable).parent / name
    found = shutil.which(name)
    if found and Path(found).resolve() == own.resolve():
        return name
    return os.path.relpath(own) if own.is_relative_to(Path.cwd()) else str(own)


def prepare_environment() -> None:
    """Switch off usage reports, progress bars and busy waiting of libraries, before any is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
