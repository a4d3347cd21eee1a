"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from tasks.titles.config import EngineName

ProfileOption = Annotated[
    str,
    typer.Option(
        "--profile", "-p", help="A profile's name (starter, starter-gpu, qwen-0.5b, qwen-7b) or a .toml file."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Change one setting of the profile; may be repeated. A dot reaches into a table: learning_rate.art=1e-3.",
    ),
]
EngineOption = Annotated[
    EngineName | None,
    typer.Option(
        "--engine",
        "-e",
        help="What trains: art (our loop, OpenPipe ART) or trl (TRL's GRPOTrainer); else the profile's.",
    ),
]
RunNameOption = Annotated[
    str | None,
    typer.Option(
        "--run-name",
        "-n",
        help="The run's folder in runs/; continued where it exists. "
        "Without it the newest unfinished run of the very same settings is continued, or a new one started.",
    ),
]
FinishedRunOption = Annotated[str | None, typer.Option("--run-name", "-n", help="The run; without it, the newest one.")]
NewestOfProfileOption = Annotated[
    str | None, typer.Option("--profile", "-p", help="Without a run name: the newest run of this profile.")
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Start a new run even where one could be continued.")]
