"""The comparison's report against its schema, its tables and its metrics."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from comparison_parts import World, six_runs, without_heldout

from tasks.titles.comparison_report import markdown, metrics, report, result_rows, side_by_side
from tasks.titles.conclusions import conclusions
from tasks.titles.config import EngineName

METHODS = ["base", "best_of_6", "human", "first_sentence", "art_best", "art_last", "trl_best", "trl_last"]
MADE = {"device": "2 CPU cores", "command": "hn-titles compare", "created": "2026-01-02T03:04:05+00:00"}
VERSIONS: dict[EngineName, str] = {"art": "0.5.18", "trl": "1.12.0"}

# The report's schema: a type for a value, a dict for a dict with exactly these keys, a list for a list of such.
INTERVAL = {"mean": float, "low": float, "high": float}
MAYBE = {"interval": (INTERVAL, None), "float": (float, None), "int": (int, None), "str": (str, None)}
FIGURES = {
    **dict.fromkeys(("reward", "score", "heldout_score", "matches", "length"), MAYBE["interval"]),
    "distinct": float,
    "titles": int,
    "failed": int,
}
ENGINE = {"loss": str, "formula": str, "learning_rate": float, "updates_per_step": str, "version": str}
SCHEMA: dict[str, Any] = {
    **dict.fromkeys(("profile", "command", "created", "device"), str),
    "test_stories": int,
    "seeds": [int],
    "titles_per_story": {"sampled": int, "best_of": int},
    "engines": {"art": ENGINE, "trl": ENGINE},
    "same_loss": bool,
    "runs": [
        {
            **dict.fromkeys(("name", "engine", "mlflow_run_id"), str),
            **dict.fromkeys(("seed", "steps", "best_step", "trajectories", "trajectories_dropped"), int),
            **dict.fromkeys(("train_seconds", "device_seconds"), float),
            "generated_tokens": int,
            "cost": MAYBE["float"],
            "peak_memory_mb": MAYBE["float"],
            "collapsed_at": MAYBE["int"],
            "time_per_step": dict.fromkeys(("write", "judge", "train", "other"), float),
            "curve": [
                {
                    **dict.fromkeys(("step", "trajectories", "tokens"), int),
                    **dict.fromkeys(("seconds", "device_seconds"), float),
                    **dict.fromkeys(("cost", "train_reward", "val_reward"), MAYBE["float"]),
                }
            ],
        }
    ],
    "methods": [
        {
            "id": str,
            "name": str,
            "engine": MAYBE["str"],
            "checkpoint": MAYBE["str"],
            "steps": ([int], None),
            "modes": ({"sampled": FIGURES, "greedy": FIGURES}, {"sampled": FIGURES}, {"text": FIGURES}),
        }
    ],
    "differences": [
        {
            **dict.fromkeys(("after", "before", "measure", "mode", "sentence"), str),
            "difference": INTERVAL,
            "ratio": MAYBE["interval"],
            "win_rate": MAYBE["interval"],
            "real": bool,
        }
    ],
    "guards": [
        {
            "method": str,
            "mode": str,
            "shares": dict.fromkeys(
                ("first_sentence", "too_long", "very_short", "emoji", "all_caps", "validator_words"), float
            ),
            "warnings": [str],
        }
    ],
    "alarms": [str],
    "conclusions": [str],
    "stories": [
        {
            **dict.fromkeys(("id", "url", "excerpt", "human_title"), str),
            "titles": [
                {
                    **dict.fromkeys(("method", "mode"), str),
                    "seed": MAYBE["int"],
                    "title": MAYBE["str"],
                    **dict.fromkeys(("reward", "score", "heldout_score"), MAYBE["float"]),
                    "verdict": (bool, None),
                    "failure": MAYBE["str"],
                }
            ],
        }
    ],
}


def fits(value: Any, schema: Any) -> bool:
    """Return whether a JSON value has the schema's shape; every number must be finite."""
    if isinstance(schema, tuple):
        return any(fits(value, each) for each in schema)
    if isinstance(schema, dict):
        return (
            isinstance(value, dict) and value.keys() == schema.keys() and all(fits(value[k], schema[k]) for k in schema)
        )
    if isinstance(schema, list):
        return isinstance(value, list) and all(fits(each, schema[0]) for each in value)
    if schema is None:
        return value is None
    return type(value) is schema and (schema is not float or math.isfinite(value))


@pytest.mark.parametrize("heldout", [True, False])
def test_the_whole_report_fits_its_schema(heldout: bool) -> None:
    comparison = World(1, art=0.9, trl=0.9).comparison(six_runs())
    comparison = comparison if heldout else without_heldout(comparison)
    found = json.loads(json.dumps(report(comparison, versions=VERSIONS, **MADE), allow_nan=False))
    assert found.keys() == SCHEMA.keys()
    for key, schema in SCHEMA.items():
        assert fits(found[key], schema), key
    assert [method["id"] for method in found["methods"]] == METHODS
    assert found["seeds"] == [1, 2, 3]
    assert [(one["engine"], one["seed"]) for one in found["runs"]] == [
        (e, s) for e in ("art", "trl") for s in (1, 2, 3)
    ]
    assert found["methods"][4]["steps"] == [20, 20, 20]
    assert found["methods"][4]["modes"]["sampled"]["titles"] == 3 * 2 * 60
    # Per story: base 2 + 1, best of six, human, first sentence, and 3 titles of 2 checkpoints of 6 runs.
    assert {len(story["titles"]) for story in found["stories"]} == {3 + 1 + 1 + 1 + 3 * 2 * 6}
    assert "heldout_score" in {each["measure"] for each in found["differences"]} or not heldout
    pairs = {(each["after"], each["before"]) for each in found["differences"] if each["measure"] == "reward"}
    assert pairs == {
        *((after, "base") for after in METHODS if after not in ("base", "first_sentence")),
        *((f"{engine}_best", before) for engine in ("art", "trl") for before in ("best_of_6", "human")),
        ("trl_best", "art_best"),
        ("trl_last", "art_last"),
    }


def test_tables_for_the_terminal_and_markdown() -> None:
    comparison = World(1, art=0.9, trl=0.9).comparison(six_runs())
    rows = result_rows(comparison)
    assert [row["titles of"] for row in rows][:3] == ["base model", "base model", "base model, best of 6"]
    assert len(rows) == 2 + 1 + 1 + 1 + 4 * 2
    (story, *_) = side_by_side(comparison, 1)
    assert list(story) == ["human titles", "base model", "base model, best of 6", "ART best", "TRL best"]
    assert story["ART best"].startswith("A plain title of art-1@best, number 0 of story 0 [")
    text = markdown(comparison, ["a link"])
    assert all(f"* {line}" in text for line in conclusions(comparison))
    assert text.endswith("* a link\n")


def test_metrics_are_finite_and_named_by_method_and_mode() -> None:
    comparison = World(1, art=0.9).comparison(six_runs())
    found = metrics(comparison)
    assert all(math.isfinite(value) for value in found.values())
    reward = comparison.figures["art_best", "sampled"].measures["reward"]
    assert reward is not None and found["test/art_best/reward/mean"] == reward.mean
    assert {"test/human/reward/low", "test/art_best/greedy/reward/mean"} <= found.keys()
