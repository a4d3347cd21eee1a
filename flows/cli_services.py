"""The commands for the services of one machine: start them, stop them, look at them."""

from __future__ import annotations

import os
import signal
from typing import Annotated

import typer

from flows.cli_options import ProfileOption, SetOption
from flows.execute import prepare_environment

app = typer.Typer()

_PORT_HELP = "Port of the {}; 0: any free one. Or HN_TITLES_PORT_{}; {} without either."


def _port(name: str, title: str, default: int) -> typer.models.OptionInfo:
    return typer.Option(f"--port-{name}", min=0, max=65535, help=_PORT_HELP.format(title, name.upper(), default))


@app.command()
def up(
    profile: ProfileOption = "starter",
    set_: SetOption = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. Or HN_TITLES_HOST; 127.0.0.1 without either.")
    ] = None,
    port_prefect: Annotated[int | None, _port("prefect", "Prefect server", 4200)] = None,
    port_mlflow: Annotated[int | None, _port("mlflow", "MLflow server", 5000)] = None,
    port_reward: Annotated[int | None, _port("reward", "reward server", 7000)] = None,
    port_worker: Annotated[int | None, _port("worker", "worker's health", 4201)] = None,
    pool: Annotated[
        str | None, typer.Option(help="Work pool of the worker. Without it cpu or gpu, by the profile's device.")
    ] = None,
) -> None:
    """Start Prefect server, MLflow server, reward server and a Prefect worker on this machine, in the background.

    All other commands given in this folder (or with the same RUNS_DIR) use them from then on, without any setting;
    the reward server where the run's profile has the model that it serves. hn-titles status shows them,
    hn-titles down stops them. They outlive the terminal, not a restart of the machine.

    What runs already is left alone, what has died is started again. A service whose address is set
    (PREFECT_API_URL, MLFLOW_TRACKING_URI, REWARD_MODEL_URL) is elsewhere and not started.

    State, logs and Prefect's database are in runs/services; MLflow's is runs/mlflow.db, as without a server. For
    PostgreSQL set PREFECT_API_DATABASE_CONNECTION_URL=postgresql+asyncpg://... and MLFLOW_BACKEND_STORE_URI=postgresql://...
    (pip install 'hn-titles[postgres]' for the latter).

    With PREFECT_API_AUTH_STRING=user:password Prefect's server asks for these; set it where --host lets others in.

    Examples:

      hn-titles up

      hn-titles up --port-mlflow 5001 --port-reward 0

      hn-titles up --profile qwen-0.5b --pool gpu
    """
    from flows.deployment_plan import read_plan
    from flows.terminal import plain_console
    from tasks.services import launcher
    from tasks.services.plan import pool_name, service_options
    from tasks.starter.paths import REWARD_MODEL, resolve
    from tasks.titles.config import ConfiguredSettings, load_profile

    wanted = load_profile(profile, set_ or [])
    ports = {"prefect": port_prefect, "mlflow": port_mlflow, "reward": port_reward, "worker": port_worker}
    options = service_options(host=host, pool=pool, **{f"port_{name}": port for name, port in ports.items()})
    settings = ConfiguredSettings()
    console = plain_console(stderr=True)
    prepare_environment()
    from flows.job_templates import job_template

    pools = {one.name: one for one in read_plan(wanted, profile, pool_type="process").work_pools}
    own = pools.get(pool_name(options, wanted.device))
    # A terminal that closes is an interruption as well: what was started is stopped.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    launcher.up(
        options,
        settings,
        explicit_ports={name: port for name, port in ports.items() if port},
        reward_model=resolve(wanted.reward_model, REWARD_MODEL),
        device=wanted.device,
        job_template=job_template(own, None, working_dir=None, image=None) if own else None,
        tell=lambda title, what: console.print(f"{title}: {what}", soft_wrap=True),
    )
    _show_status()
    out = plain_console()
    out.print("hn-titles uses them now. For other programs, such as prefect and mlflow:")
    for name, address in _addresses().items():
        out.print(f"  export {name}={address}", soft_wrap=True)
    out.print("Stop them: hn-titles down")


@app.command()
def down() -> None:
    """Stop all that hn-titles up has started, flow runs of its worker included. Databases and logs stay.

    Example:

      hn-titles down
    """
    from flows.terminal import plain_console
    from tasks.services import launcher
    from tasks.titles.config import ConfiguredSettings

    console = plain_console(stderr=True)
    ended = launcher.down(
        ConfiguredSettings().runs_dir, lambda title, what: console.print(f"{title}: {what}", soft_wrap=True)
    )
    console.print(f"{ended} processes have ended." if ended else "Nothing was running.")


@app.command()
def status() -> None:
    """Show the services of hn-titles up: address, process, health, log. Exit code 3 unless all are healthy.

    Example:

      hn-titles status
    """
    from flows.terminal import plain_console

    healthy = _show_status()
    if healthy is None:
        plain_console().print("No services run here. Start them: hn-titles up")
    if not healthy:
        raise typer.Exit(3)


def _show_status() -> bool | None:
    """Print the table and return whether all are healthy, None where there is nothing to show."""
    from flows.terminal import plain_console, table
    from tasks.services import launcher
    from tasks.titles.config import ConfiguredSettings

    found = launcher.status(ConfiguredSettings())
    if not found:
        return None
    rows = [
        {
            "service": one.record.title,
            "address": one.record.address,
            "pid": str(one.record.pid),
            "health": one.health,
            "log": os.path.relpath(one.record.log),
        }
        for one in found
    ]
    plain_console().print(table(rows, "Services"))
    return all(one.healthy for one in found)


def _addresses() -> dict[str, str]:
    """Return what the running services are to be called in the environment of other programs."""
    from tasks.titles.config import Settings

    settings = Settings()
    addresses = {"PREFECT_API_URL": settings.prefect_api_url, "MLFLOW_TRACKING_URI": settings.mlflow_tracking_uri}
    return {name: address for name, address in addresses.items() if address}
