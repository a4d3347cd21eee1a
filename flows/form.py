"""The parameters that flows share: what the form in the Prefect UI offers and refuses.

A profile has more settings than a form has room for. The ones that are changed most are parameters of their own;
`overrides` reaches all the others. An empty parameter leaves the profile as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date
from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from tasks.titles.config import EngineName, profile_names

# The form offers the profiles of the project; the command line also takes the path of a .toml file.
ProfileName = Annotated[str, WithJsonSchema({"type": "string", "enum": profile_names()})]
Override = Annotated[
    str, WithJsonSchema({"type": "string", "pattern": r"^[A-Za-z_][A-Za-z0-9_.]*=", "examples": ["group_size=8"]})
]
Overrides = list[Override] | None
RunName = Annotated[str, WithJsonSchema({"type": "string", "pattern": r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"})] | None
Engine = EngineName | None
Stories = Annotated[str, Field(min_length=1, examples=["starter", "my_stories.parquet"])] | None
MinimumScore = Annotated[int, Field(ge=0, le=10_000)] | None
MaxSteps = Annotated[int, Field(ge=1, le=100_000)] | None
LearningRate = Annotated[float, Field(gt=0, le=0.1)] | None
GroupSize = Annotated[int, Field(ge=2, le=64)] | None
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Seeds = Annotated[list[Seed], Field(min_length=1, max_length=20)] | None
TestStories = Annotated[int, Field(ge=1, le=100_000)] | None
Epochs = Annotated[float, Field(gt=0, le=100)] | None
Day = date | None


def filled_in(overrides: list[str] | None, fields: Mapping[str, Any]) -> list[str]:
    """Return `overrides` with the form's fields, by the name of their setting, after them; None changes nothing."""
    return [
        *(overrides or []),
        # JSON, so that a text such as 5 or null stays a text.
        *(f"{key}={json.dumps(value, default=str)}" for key, value in fields.items() if value is not None),
    ]


def training_fields(
    *,
    engine: str | None,
    stories: str | None,
    max_steps: int | None,
    learning_rate: float | None,
    group_size: int | None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Return the settings that the form of a training fills in."""
    return {
        "engine": engine,
        "stories": stories,
        "max_steps": max_steps,
        # Only the one of the engine that trains is read.
        "learning_rate.art": learning_rate,
        "learning_rate.trl": learning_rate,
        "group_size": group_size,
        "seed": seed,
    }
