"""What `hn-titles train --dry-run` prints; heavy imports stay inside."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.services.dry_run import DryRun


def check_before_training(profile_name: str, overrides: list[str], run_name: str | None, fresh: bool) -> bool:
    """Print what the training would take and why it would not fit, and return whether it could start."""
    from flows.execute import prepare_environment
    from flows.terminal import Bars, plain_console
    from tasks.services.dry_run import dry_run
    from tasks.services.machine import look_around
    from tasks.services.plan import service_options
    from tasks.titles.config import Settings, load_profile

    profile, settings = load_profile(profile_name, overrides), Settings()
    prepare_environment()
    with Bars(plain_console(stderr=True), {}) as bars:
        found = dry_run(
            profile,
            settings,
            look_around(settings, service_options()),
            run_name=run_name,
            fresh=fresh,
            progress=lambda done, total: bars("reading stories", done, total, ""),
        )
    _show(found, f"{profile.name} with {profile.engine} on {profile.device}")
    return found.fits


def _show(found: DryRun, title: str) -> None:
    """Print it in 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from flows.terminal import plain_console

    console = plain_console()
    facts = Table(title=f"What it would take: {title}", show_header=False)
    memory = Table("", "memory", "about", title="Estimated, not measured")
    for grid in (facts, memory):
        grid.title_justify, grid.title_style, grid.box, grid.pad_edge = "left", "bold", SIMPLE_HEAD, False
    for name, what in found.facts:
        facts.add_row(name, Text(what, overflow="fold"))
    phase = ""
    for name, part, size in found.memory:
        memory.add_row("" if name == phase else name, part or "together", size, end_section=not part)
        phase = name
    console.print(facts)
    if found.memory:
        console.print(memory)
    for note in found.notes:
        console.print(note)
    if found.fits:
        console.print("It fits. Nothing was started.")
        return
    console.print("It would not run here:", style="bold")
    for problem in found.problems:
        console.print(f"* {problem}")
