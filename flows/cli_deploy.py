"""The command that applies deployments/prefect.yaml and automations.yaml; heavy imports stay inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli_options import ProfileOption
from flows.deployment_plan import PoolType
from flows.execute import prepare_environment

app = typer.Typer()


@app.command("deploy")
def deploy(
    profile: ProfileOption = "starter",
    working_dir: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            resolve_path=True,
            help="Where the workers' runs work: the folder of runs/ and .env; containers have it at /work. Without it "
            "a new work pool takes the present folder, and one that exists keeps its own.",
        ),
    ] = None,
    pool_type: Annotated[
        PoolType | None,
        typer.Option(help="What workers make of a flow run. Without it what prefect.yaml says: process."),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The containers' image without its tag, such as registry.example.com/hn-titles. Without it a work "
            "pool that exists keeps its own.",
        ),
    ] = None,
) -> None:
    """Bring Prefect's work pools, limits, deployments and automations to what deployments/ says.

    Says of each whether it was created, updated or left unchanged. The profile is what the forms start from; with one
    that computes on the CPU everything goes to the work pool cpu. Schedules that cost money start paused, and what is
    switched in the UI stays so.

    Examples:

      hn-titles deploy

      hn-titles deploy --profile qwen-0.5b

      hn-titles deploy --profile qwen-0.5b --pool-type kubernetes --image registry.example.com/hn-titles
    """
    import asyncio

    from flows.deployment_plan import read_automations, read_plan
    from flows.prefect_server import configured_api
    from flows.terminal import plain_console
    from tasks.titles.config import Settings, load_profile

    settings = Settings()
    plan = read_plan(load_profile(profile), profile, pool_type=pool_type)
    prepare_environment()
    configured_api(settings.prefect_api_url)

    console = plain_console()
    console.print(f"Deploying with profile {profile}; the first deployment takes as long as the flows' imports.")

    from flows.deploy import Applied, apply_plan

    def say(item: Applied) -> None:
        note = f" ({item.note})" if item.note else ""
        console.print(f"{item.outcome:<10} {item.kind} {item.name}{note}", soft_wrap=True)

    webhook = settings.notification_webhook_url
    asyncio.run(
        apply_plan(
            plan,
            read_automations(),
            working_dir=working_dir,
            image=image,
            webhook_url=webhook.get_secret_value() if webhook else None,
            on_applied=say,
        )
    )
    pools = sorted({entry.work_pool.name for entry in plan.deployments})
    console.print("Workers: " + ", ".join(f"prefect worker start --pool {pool}" for pool in pools), soft_wrap=True)
