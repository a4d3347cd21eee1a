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


def form_schema(schema: Mapping[str, Any], fixed: Mapping[str, str]) -> dict[str, Any]:
    """Return the schema of a flow's parameters as a deployment's form shows it best.

    A parameter that may be left empty becomes a plain field: with Prefect's own «type or None» one has to choose the
    type before one can fill it in. The server takes null for it all the same. A choice keeps its None, which the
    server would refuse without. What is `fixed` has its value as the only choice, and `overrides` comes last.
    """
    fields = {name: _form_field(field) for name, field in schema["properties"].items()}
    for name, value in fixed.items():
        kept = {key: fields[name][key] for key in ("title", "position")}
        fields[name] = {
            **kept,
            "type": "string",
            "enum": [value],
            "default": value,
            "description": f"always {value} in this deployment",
        }
    if "overrides" in fields:
        fields["overrides"]["position"] = len(fields)
    return {**schema, "properties": fields}


def _form_field(field: Mapping[str, Any]) -> dict[str, Any]:
    offered = [one for one in field.get("anyOf", ()) if one != {"type": "null"}]
    if len(offered) != 1 or "enum" in offered[0]:
        return dict(field)
    return {**{key: value for key, value in field.items() if key not in {"anyOf", "default"}}, **offered[0]}
