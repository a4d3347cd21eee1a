"""The command that says what this machine can run; heavy imports stay inside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from tasks.titles.errors import UserError

if TYPE_CHECKING:
    from tasks.services.doctor import Finding, Verdict

app = typer.Typer()

_SIGNS = {"ok": "ok", "note": "note", "wrong": "WRONG"}


@app.command()
def doctor(
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile", "-p", help="Judge this profile alone, by name or .toml file; the exit code is about it."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON, for programs.")] = False,
) -> None:
    """Say what this machine can run, and what to do about what is missing.

    Looks at GPUs, memory, packages of each engine's environment, disks, ports and services. Nothing is started, nothing
    is written and no model is loaded. Exit code 0 where the profile (starter without --profile) can run, 2 where not.

    Examples:

      hn-titles doctor

      hn-titles doctor --profile qwen-7b

      hn-titles doctor --json
    """
    import json
    from dataclasses import asdict

    from tasks.services.doctor import findings, verdict
    from tasks.services.machine import look_around
    from tasks.services.plan import service_options
    from tasks.titles.config import Settings, load_profile, profile_names

    profiles = [load_profile(name) for name in ([profile] if profile else profile_names())]
    settings = Settings()
    machine = look_around(settings, service_options())
    found = findings(machine)
    verdicts = [verdict(one, machine, settings) for one in profiles]
    if as_json:
        report = {
            "machine": asdict(machine),
            "findings": [asdict(one) for one in found],
            "profiles": {one.profile: {"can_run": one.can_run, "engines": one.engines} for one in verdicts},
        }
        typer.echo(json.dumps(report, indent=2))
    else:
        _show(found, verdicts)
    decisive = verdicts[0] if profile else next(one for one in verdicts if one.profile == "starter")
    if not decisive.can_run:
        raise typer.Exit(UserError.exit_code)


def _show(found: Sequence[Finding], verdicts: Sequence[Verdict]) -> None:
    """Print findings and verdicts in 80 columns: what to do stands below what was found."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from flows.terminal import plain_console

    console = plain_console()
    grid = Table(title="This machine", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    grid.add_column("")
    grid.add_column("", no_wrap=True)
    grid.add_column("found, and what to do", overflow="fold")
    area = ""
    for one in found:
        what = Text(one.what) + (Text(f"\n-> {one.to_do}", style="bold") if one.to_do else Text())
        grid.add_row("" if one.area == area else one.area, _SIGNS[one.state], what)
        area = one.area
    console.print(grid)
    for judged in verdicts:
        engines = [name for name, reasons in judged.engines.items() if not reasons]
        head = f"can run, with {' and '.join(engines)}" if engines else "cannot run"
        console.print(Text(judged.profile, style="bold") + Text(f": {head}", style="not bold"))
        shared = set.intersection(*(set(reasons) for reasons in judged.engines.values()))
        for name, reasons in judged.engines.items():
            for reason in reasons:
                if reason not in shared:
                    console.print(f"  {name}: {reason}")
        for reason in dict.fromkeys(reason for reasons in judged.engines.values() for reason in reasons):
            if reason in shared:
                console.print(f"  {reason}")
