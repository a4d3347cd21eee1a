"""The command line `hn-titles`; heavy imports stay inside the commands, so that --help is quick."""

from __future__ import annotations

import signal
import sys
import traceback
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows import cli_deploy, cli_doctor, cli_policy, cli_reward_model, cli_services
from flows.cli_options import (
    EngineOption,
    FinishedRunOption,
    FreshOption,
    NewestOfProfileOption,
    ProfileOption,
    RunNameOption,
    SetOption,
)
from flows.cli_results import show_comparison, show_results, show_trained
from flows.execute import Flow, execute, prepare_environment, verb_of
from tasks.titles.config import EngineName
from tasks.titles.errors import HnTitlesError, UserError

if TYPE_CHECKING:
    from tasks.titles.run_directory import RunDirectory

INTERRUPTED = 130
UNEXPECTED = 1

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help=(
        "Train a small language model with GRPO to write Hacker News titles.\n\n"
        "Start with [bold]hn-titles run[/bold]: it needs no GPU, no account and no network, takes a few minutes, "
        "and shows what it did in Prefect and MLflow.\n\n"
        "Addresses and secrets come from the environment or .env: REWARD_MODEL_URL, REWARD_MODEL_API_KEY, "
        "HELDOUT_REWARD_MODEL_URL, MLFLOW_TRACKING_URI, PREFECT_API_URL, HF_ENDPOINT, RUNS_DIR. Where they are not "
        "set, the services of [bold]hn-titles up[/bold] are used while they run."
    ),
    epilog=(
        "Exit codes: 0 done, 1 unexpected error, 2 something to mend in profile, flags or stories, 3 a service failed, "
        "4 training stopped itself, 5 checkpoints do not fit, 130 interrupted."
    ),
)

# Without a name: their commands stand beside those of this file.
app.add_typer(cli_policy.app)
app.add_typer(cli_reward_model.app)
app.add_typer(cli_services.app)
app.add_typer(cli_deploy.app)
app.add_typer(cli_doctor.app)


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Keep what holds for every command."""
    context.obj = debug


@app.command()
def run(
    profile: ProfileOption = "starter",
    engine: EngineOption = None,
    set_: SetOption = None,
    run_name: RunNameOption = None,
    fresh: FreshOption = False,
) -> None:
    """Train, evaluate and report: the whole job in one command.

    Ends with a table of base model, best checkpoint and human titles, sample titles, and the path of summary.json.

    Interrupted or killed, it continues from its last checkpoint when given again.

    Examples:

      hn-titles run

      hn-titles run --set max_steps=5 --run-name try

      hn-titles run --set stories=my_stories.parquet --set max_steps=20
    """
    overrides = _with_engine(set_, engine)
    run_directory = _open_run(profile, overrides, run_name, fresh, until="evaluated")

    def job() -> Flow:
        from flows.run import run_titles

        return partial(run_titles, profile, overrides, run_directory.name)

    execute(run_directory, verb_of(run_directory), job, show_results)


@app.command()
def train(
    profile: ProfileOption = "starter",
    engine: EngineOption = None,
    set_: SetOption = None,
    run_name: RunNameOption = None,
    fresh: FreshOption = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Start and write nothing: say what it would take and whether it fits. Exit code 2 where it does not.",
        ),
    ] = False,
) -> None:
    """Train only; hn-titles evaluate does the rest.

    Examples:

      hn-titles train --engine trl --set max_steps=20

      hn-titles train --run-name long --set max_steps=200

      hn-titles train --profile qwen-7b --dry-run
    """
    overrides = _with_engine(set_, engine)
    if dry_run:
        from flows.cli_dry_run import check_before_training

        if not check_before_training(profile, overrides, run_name, fresh):
            raise typer.Exit(UserError.exit_code)
        return
    run_directory = _open_run(profile, overrides, run_name, fresh, until="trained")

    def job() -> Flow:
        from flows.train import train_titles

        return partial(train_titles, profile, overrides, run_directory.name)

    execute(run_directory, verb_of(run_directory), job, show_trained)


@app.command()
def evaluate(
    run_name: FinishedRunOption = None,
    profile: NewestOfProfileOption = None,
    set_: SetOption = None,
) -> None:
    """Evaluate a run's best and last checkpoint, the base model and the human titles on the test stories.

    Examples:

      hn-titles evaluate

      hn-titles evaluate --run-name starter-art-1 --set test_stories=300
    """
    from tasks.titles.config import Settings
    from tasks.titles.run_directory import find_run

    run_directory = find_run(Settings().runs_dir, run_name=run_name, profile_name=profile, overrides=set_ or [])

    def job() -> Flow:
        from flows.evaluate import evaluate_run

        return partial(evaluate_run, run_directory.name, None, set_ or [])

    execute(run_directory, "Evaluating", job, show_results)


@app.command()
def compare(
    profile: ProfileOption = "starter",
    set_: SetOption = None,
    seeds: Annotated[str, typer.Option(help="Seeds that each engine is trained with, separated by commas.")] = "1,2,3",
    runs: Annotated[
        list[str] | None,
        typer.Option(
            "--run", help="Compare these trained runs instead; may be repeated. Both engines need the same seeds."
        ),
    ] = None,
    titles: Annotated[int, typer.Option(min=0, help="Stories to show titles of, side by side.")] = 6,
) -> None:
    """Train with ART and with TRL, and compare what they write with the base model, its best of six and people.

    Runs that were trained before with the very same settings are used again. Ends with a table, what can be
    concluded from it, titles side by side, and the path of report.html, which opens without a network.

    Examples:

      hn-titles compare

      hn-titles compare --seeds 1,2,3,4,5 --set max_steps=40

      hn-titles compare --run starter-art-1 --run starter-trl-1 --titles 20
    """
    from tasks.titles.comparison_runs import named_runs, open_comparison
    from tasks.titles.config import Settings, load_profile

    numbers = _seeds(seeds)
    runs_dir = Settings().runs_dir
    wanted = named_runs(runs, runs_dir)[0].profile if runs else load_profile(profile, set_ or [])
    home = open_comparison(wanted, runs_dir)

    def job() -> Flow:
        from flows.compare import compare_engines

        return partial(compare_engines, profile, set_ or [], numbers, runs, home.name)

    execute(home, "Comparing in", job, partial(show_comparison, titles=titles))


@app.command("check-data")
def check_data(profile: ProfileOption = "starter", set_: SetOption = None) -> None:
    """Show what becomes of the stories: counts by reason, prompt lengths, three examples.

    Examples:

      hn-titles check-data

      hn-titles check-data --set stories=my_stories.jsonl --set minimum_score=50
    """
    from flows.terminal import Bars, plain_console, table
    from tasks.titles.config import Settings, load_profile
    from tasks.titles.prepare import prepare_prompts

    wanted = load_profile(profile, set_ or [])
    prepare_environment()
    with Bars(plain_console(stderr=True), {}) as bars:
        prepared = prepare_prompts(
            wanted,
            cache_dir=Settings().runs_dir / ".cache",
            progress=lambda done, total: bars("reading stories", done, total, ""),
        )
    console = plain_console()
    report = prepared.report
    console.print(table(_texts(report.rows()), f"Stories from {report.source}"))
    for note in report.notes:
        console.print(note)
    for repair, count in report.repairs.items():
        console.print(f"mended: {repair} in {count} stories")
    console.print(table(_texts(report.token_rows()), "Prompt lengths in tokens"))
    for example in report.examples:
        console.rule(f"story {example.id}, {example.score} points, {example.tokens} tokens", align="left")
        console.print(example.prompt)
        console.print(f"\nhuman title: {example.title}")


def main() -> None:
    """Run the command line; a user's mistake gives no traceback."""
    debug = "--debug" in sys.argv[1:]
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # So a script starts what it puts into the background. A termination, which is handled as an interruption, would
        # do nothing either.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        app()
    except HnTitlesError as error:
        _fail("" if isinstance(error, UserError) else f"{type(error).__name__}: ", error, debug)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        _fail(f"Unexpected {type(error).__name__}: ", error, debug)
        sys.stderr.write("This is a fault of the program. --debug before the command shows where.\n")
        sys.exit(UNEXPECTED)


def _with_engine(overrides: list[str] | None, engine: EngineName | None) -> list[str]:
    return [*(overrides or []), *([f"engine={engine}"] if engine else [])]


def _open_run(profile: str, overrides: list[str], run_name: str | None, fresh: bool, *, until: Any) -> RunDirectory:
    from tasks.engines.training_state import MAY_CHANGE
    from tasks.titles.config import Settings, load_profile
    from tasks.titles.run_directory import open_run

    return open_run(
        load_profile(profile, overrides),
        runs_dir=Settings().runs_dir,
        run_name=run_name,
        fresh=fresh,
        until=until,
        may_change=MAY_CHANGE,
    )


def _seeds(text: str) -> list[int]:
    from tasks.titles.errors import ConfigError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--seeds expects whole numbers separated by commas, such as 1,2,3; got '{text}'.") from error


def _texts(rows: Any) -> list[dict[str, str]]:
    return [{name: str(value) for name, value in row.items()} for row in rows]


def _fail(kind: str, error: BaseException, debug: bool) -> None:
    from flows.terminal import plain_console

    plain_console(stderr=True).print(f"{kind}{error}", style="red", soft_wrap=True)
    if debug:
        traceback.print_exception(error)


if __name__ == "__main__":
    main()
