"""The commands for what was trained: promote a checkpoint, have titles suggested; heavy imports stay inside them."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Annotated

import typer

from flows.cli_options import FinishedRunOption, NewestOfProfileOption, ProfileOption, SetOption
from flows.cli_results import show_promotion, show_suggestions
from flows.execute import STAGES, Flow, execute, prepare_environment

app = typer.Typer()


@app.command()
def promote(
    run_name: FinishedRunOption = None,
    profile: NewestOfProfileOption = None,
    set_: SetOption = None,
) -> None:
    """Register an evaluated run's best checkpoint; make it champion where it is surely better than the present one.

    The first champion has to be better than the base model. Better: the 95% interval of the paired difference on the
    same test stories lies above 0.

    Examples:

      hn-titles promote

      hn-titles promote --run-name starter-art-1

      hn-titles promote --set registered_name=my-titles
    """
    from tasks.titles.config import Settings
    from tasks.titles.promotion import read_candidate
    from tasks.titles.run_directory import find_run

    run_directory = find_run(Settings().runs_dir, run_name=run_name, profile_name=profile, overrides=set_ or [])
    # What is missing is said before anything starts.
    read_candidate(run_directory)

    def job() -> Flow:
        from flows.promote import promote_run

        return partial(promote_run, run_directory.name, None, set_ or [])

    execute(run_directory, "Promoting", job, show_promotion)


@app.command()
def suggest(
    source: Annotated[str, typer.Argument(metavar="FILE|URL|-", help="The text: a file, an address, or - for stdin.")],
    count: Annotated[int, typer.Option("--count", "-c", min=1, max=64, help="How many titles.")] = 6,
    run_name: Annotated[
        str | None, typer.Option("--run-name", "-n", help="Write with this run's best checkpoint.")
    ] = None,
    step: Annotated[int | None, typer.Option(min=0, help="With --run-name: another of its checkpoints.")] = None,
    profile: ProfileOption = "starter",
    set_: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help="Fetch from addresses of this machine and its network, too.")
    ] = False,
) -> None:
    """Write titles for a text with the champion (else with the base model), ranked by reward.

    Score: predicted log upvotes. Supported: whether the text bears the title out. Reward: the score of a supported
    title, else 0.

    Examples:

      hn-titles suggest article.txt

      hn-titles suggest https://example.com/post --count 10 --json

      pandoc post.md -t plain | hn-titles suggest - --run-name starter-art-1 --step 40
    """
    import asyncio

    from flows.terminal import Bars, output_to
    from tasks.titles.config import Settings, load_profile
    from tasks.titles.given_text import read_text

    settings = Settings()
    wanted = load_profile(profile, set_ or [])
    given = asyncio.run(read_text(source, allow_private=allow_private))
    prepare_environment()
    logs = settings.runs_dir / ".cache"
    logs.mkdir(parents=True, exist_ok=True)
    with output_to(logs / "suggest.log") as (_, screen), Bars(screen, {**STAGES, "titles": "titles"}) as bars:
        # Libraries and MLflow take their time, too.
        bars("judges", 0, None, "")
        from tasks.engines.suggest import chosen_writer
        from tasks.engines.suggest import suggest as suggest_titles

        with chosen_writer(wanted, set_ or [], settings, run_name=run_name, step=step) as writer:
            screen.print(f"Titles are written by {writer.name}.", soft_wrap=True)
            found = asyncio.run(
                suggest_titles(
                    writer,
                    given,
                    count,
                    settings,
                    log_folder=logs,
                    on_progress=lambda stage, done, total: bars(stage, done, total, ""),
                )
            )
    if as_json:
        sys.stdout.write(json.dumps(found.as_dict(), indent=2, ensure_ascii=False) + "\n")
    else:
        show_suggestions(found)
