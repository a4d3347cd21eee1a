"""The commands for reward models: train one, serve one, check a server; heavy imports stay inside them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli_options import FreshOption, ProfileOption, RunNameOption, SetOption
from flows.cli_results import show_reward_model
from flows.execute import Flow, execute, prepare_environment, verb_of

if TYPE_CHECKING:
    from tasks.titles.config import Profile

app = typer.Typer()


@app.command("train-reward-model")
def train_reward_model(
    profile: ProfileOption = "starter",
    set_: SetOption = None,
    run_name: RunNameOption = None,
    fresh: FreshOption = False,
) -> None:
    """Train a reward model on stories and their scores, and register it in MLflow.

    The settings are the profile's table reward_training. Ends with the figures of each split and how to use the model.

    Interrupted or killed, it continues from its last checkpoint when given again.

    Examples:

      hn-titles train-reward-model

      hn-titles train-reward-model --set stories=my_stories.parquet --set reward_training.epochs=2

      hn-titles train-reward-model --profile qwen-0.5b --set reward_training.train_until=2024-12-31
    """
    from tasks.reward_training.runs import open_reward_run
    from tasks.titles.config import Settings, load_profile

    wanted = load_profile(profile, set_ or [])
    run_directory = open_reward_run(wanted, Settings().runs_dir, run_name=run_name, fresh=fresh)

    def job() -> Flow:
        from flows.train_reward_model import train_reward_model as train_it

        return partial(train_it, profile, set_ or [], run_directory.name)

    execute(run_directory, verb_of(run_directory), job, show_reward_model)


@app.command("serve-reward-model")
def serve_reward_model(
    profile: ProfileOption = "starter",
    set_: SetOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes any free one.")] = 7000,
    heldout: Annotated[bool, typer.Option("--heldout", help="Serve the held-out reward model instead.")] = False,
) -> None:
    """Serve the profile's reward model over HTTP until Ctrl-C; python -m reward_server has more options.

    Set REWARD_MODEL_URL=http://127.0.0.1:7000 and runs use it instead of starting one of their own.

    Examples:

      hn-titles serve-reward-model

      hn-titles serve-reward-model --set reward_model=path/to/model --port 7001
    """
    from reward_server.__main__ import main as serve

    wanted, model = _reward_model(profile, set_, heldout)
    arguments = ["--model", model, "--device", wanted.device, "--host", host, "--port", str(port)]
    raise typer.Exit(serve(arguments))


@app.command("check-reward-server")
def check_reward_server(
    profile: ProfileOption = "starter",
    set_: SetOption = None,
    url: Annotated[
        str | None, typer.Option(help="The server; without it REWARD_MODEL_URL, or else http://127.0.0.1:7000.")
    ] = None,
    heldout: Annotated[bool, typer.Option("--heldout", help="Compare with the held-out reward model.")] = False,
) -> None:
    """Prove that a reward server is up, deterministic and equal to plain transformers, and measure its speed.

    Examples:

      hn-titles check-reward-server

      hn-titles check-reward-server --url http://gpu-box:7000 --set reward_model=path/to/model
    """
    import asyncio

    from flows.terminal import plain_console, table
    from reward_server.check import check_server
    from tasks.titles.config import Settings

    _, model = _reward_model(profile, set_, heldout)
    settings = Settings()
    key = settings.reward_model_api_key
    address = url or (settings.heldout_reward_model_url if heldout else settings.reward_model_url)
    prepare_environment()
    report = asyncio.run(
        check_server(address or "http://127.0.0.1:7000", model, api_key=key.get_secret_value() if key else None)
    )
    rows = [
        {"check": result.name, "": "passed" if result.passed else "FAILED", "detail": result.detail}
        for result in report.results
    ]
    console = plain_console()
    console.print(table(rows, f"Reward server {report.url}"))
    if report.single_per_s and report.batch_per_s:
        console.print(
            f"Speed: {report.single_per_s:.0f} titles a second asked one by one (32 in flight), "
            f"{report.batch_per_s:.0f} in batches of 48."
        )
    if not report.passed:
        raise typer.Exit(3)


def _reward_model(profile: str, overrides: list[str] | None, heldout: bool) -> tuple[Profile, str]:
    from tasks.starter.paths import HELDOUT_REWARD_MODEL, REWARD_MODEL, resolve
    from tasks.titles.config import load_profile
    from tasks.titles.errors import ConfigError

    wanted = load_profile(profile, overrides or [])
    if not heldout:
        return wanted, resolve(wanted.reward_model, REWARD_MODEL)
    if wanted.heldout_reward_model is None:
        raise ConfigError(f"Profile {wanted.name} has no heldout_reward_model. Give one with --set.")
    return wanted, resolve(wanted.heldout_reward_model, HELDOUT_REWARD_MODEL)
