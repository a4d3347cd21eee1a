"""A comparison as data (report.json), as tables and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tasks.titles.comparison import ENGINES, ComparedRun, Comparison, Difference, Method
from tasks.titles.conclusions import FORMULAS, conclusions, loss_of, same_loss, sentence
from tasks.titles.config import EngineName
from tasks.titles.curves import cost
from tasks.titles.evaluation import BASE, BEST_OF, BEST_OF_N, HUMAN, MEASURES, SAMPLED_TITLES, EvaluatedTitle, Mode
from tasks.titles.opening import cut
from tasks.titles.statistics import Interval
from tasks.titles.story import Prompt
from tasks.titles.summary import HEADINGS, SAMPLE_STORIES, format_interval, markdown_table, title_cell

EXCERPT_LENGTH = 400
"""Characters of a body that the report shows."""
_SIDE_BY_SIDE = (HUMAN, BASE, BEST_OF_N, "art_best", "trl_best")


def report(
    comparison: Comparison, *, device: str, versions: Mapping[EngineName, str], command: str, created: str
) -> dict[str, Any]:
    """Return what report.json holds, as plain JSON values.

    `device` says what was computed on, `versions` of which release each framework is, `created` is the time in ISO's
    form.
    """
    seeds = len(comparison.seeds)
    return {
        "profile": comparison.profile.name,
        "command": command,
        "created": created,
        "device": device,
        "test_stories": len(comparison.prompts),
        "seeds": list(comparison.seeds),
        "titles_per_story": {"sampled": SAMPLED_TITLES, "best_of": BEST_OF},
        "engines": {engine: _engine(comparison, engine, versions[engine]) for engine in ENGINES},
        "same_loss": same_loss(comparison),
        "runs": [_run(run) for engine in ENGINES for run in comparison.runs_of(engine)],
        "methods": [_method(comparison, method) for method in comparison.methods.values()],
        "differences": [_difference(found, seeds) for found in comparison.differences],
        "guards": [
            {
                "method": found.method.id,
                "mode": mode_name(found.mode),
                "shares": dict(found.shares),
                "warnings": list(found.warnings),
            }
            for found in comparison.guards
        ],
        "alarms": list(comparison.alarms),
        "conclusions": conclusions(comparison),
        "stories": _stories(comparison),
    }


def metrics(comparison: Comparison) -> dict[str, float]:
    """Return every method's figures by metric name: `test/art_best/reward/mean`, `test/art_best/greedy/reward/mean`."""
    named: dict[str, float] = {}
    for (method, mode), found in comparison.figures.items():
        prefix = f"test/{method}/greedy" if mode == "greedy" else f"test/{method}"
        for name, interval in found.measures.items():
            if interval is not None:
                named |= {f"{prefix}/{name}/{part}": value for part, value in interval.as_dict().items()}
    return named


def mode_name(mode: Mode) -> str:
    """Return a mode by the report's name: titles that no model wrote are texts."""
    return "text" if mode == "human" else mode


def result_rows(comparison: Comparison) -> list[dict[str, str]]:
    """Return the table of results as text: one row per method and mode, one column per measure."""
    rows = []
    for (method, mode), found in comparison.figures.items():
        row = {"titles of": comparison.methods[method].name, "how": "-" if mode_name(mode) == "text" else mode}
        row |= {HEADINGS.get(name, name): format_interval(found.measures[name], name) for name in MEASURES}
        rows.append(row | {"distinct": f"{found.distinct:.0%}", "failed": str(found.failed)})
    return rows


def side_by_side(comparison: Comparison, count: int = SAMPLE_STORIES) -> list[dict[str, str]]:
    """Return the titles of the first `count` stories side by side, each with its reward in brackets.

    Checkpoints are those of the first seed. Titles are greedy ones where the method has any.
    """
    columns = {
        method.name: {title.story_id: title for title in comparison.titles_of(method, method.modes[-1])[0]}
        for method in (comparison.methods[name] for name in _SIDE_BY_SIDE)
    }
    return [
        {name: title_cell(titles[prompt.story.id]) for name, titles in columns.items()}
        for prompt in comparison.prompts[:count]
    ]


def markdown(comparison: Comparison, links: Sequence[str] = ()) -> str:
    """Return the comparison as Markdown; `links` are lines that lead to the report and to MLflow."""
    warned = [
        f"{found.method.name} ({mode_name(found.mode)}): {warning}"
        for found in comparison.guards
        for warning in found.warnings
    ]
    seeds = ", ".join(str(seed) for seed in comparison.seeds)
    parts = [
        f"# ART and TRL on profile {comparison.profile.name}",
        f"Seed{'s' if len(comparison.seeds) > 1 else ''} {seeds}; {len(comparison.prompts)} test stories.",
        _bullets(conclusions(comparison)),
        *(f"**{alarm}**" for alarm in comparison.alarms),
        _bullets(warned),
        markdown_table(result_rows(comparison)),
        "Means over seeds and test stories with 95% bootstrap intervals; lengths in characters, held-out: the score of "
        "the reward model that training never saw.",
        f"## Titles of seed {comparison.seeds[0]}, with their reward",
        markdown_table(side_by_side(comparison)),
        _bullets(links),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)


def _engine(comparison: Comparison, engine: EngineName, version: str) -> dict[str, Any]:
    profile, loss = comparison.runs_of(engine)[0].profile, loss_of(comparison, engine)
    return {
        "loss": loss,
        "formula": FORMULAS[engine, loss],
        "learning_rate": getattr(profile.learning_rate, engine),
        # The setting is ART's; TRL always makes one.
        "updates_per_step": profile.updates_per_step if engine == "art" else "one",
        "version": version,
    }


def _run(run: ComparedRun) -> dict[str, Any]:
    training = run.training
    return {
        "name": run.run_name,
        "engine": run.engine,
        "seed": run.seed,
        "steps": training.steps,
        "best_step": training.best_step,
        "train_seconds": training.seconds,
        "device_seconds": training.seconds * run.profile.devices_in_use,
        "cost": cost(training.seconds, run.profile),
        "trajectories": run.trajectories,
        "trajectories_dropped": training.trajectories_dropped,
        "generated_tokens": run.generated_tokens,
        "peak_memory_mb": run.peak_memory_mb,
        "collapsed_at": training.collapsed_at,
        "mlflow_run_id": training.mlflow_run_id,
        "time_per_step": asdict(run.time_per_step),
        "curve": [asdict(point) for point in run.curve],
    }


def _method(comparison: Comparison, method: Method) -> dict[str, Any]:
    modes = {}
    for mode in method.modes:
        found = comparison.figures[method.id, mode]
        measures = {name: _interval(interval) for name, interval in found.measures.items()}
        counts = {"distinct": found.distinct, "titles": found.titles, "failed": found.failed}
        modes[mode_name(mode)] = measures | counts
    return {
        "id": method.id,
        "name": method.name,
        "engine": method.engine,
        "checkpoint": method.checkpoint,
        "steps": list(method.steps) if method.steps else None,
        "modes": modes,
    }


def _difference(found: Difference, seeds: int) -> dict[str, Any]:
    return {
        "after": found.after.id,
        "before": found.before.id,
        "measure": found.measure,
        "mode": "sampled",
        "difference": found.difference.as_dict(),
        "ratio": _interval(found.ratio),
        "win_rate": _interval(found.win_rate),
        "real": found.real,
        "sentence": sentence(found, seeds),
    }


def _interval(interval: Interval | None) -> dict[str, float] | None:
    return interval.as_dict() if interval else None


def _stories(comparison: Comparison) -> list[dict[str, Any]]:
    titles: dict[str, list[dict[str, Any]]] = {prompt.story.id: [] for prompt in comparison.prompts}
    for method in comparison.methods.values():
        for mode in method.modes:
            for seed, own in zip(method.seeds, comparison.titles_of(method, mode), strict=True):
                for title in own:
                    titles[title.story_id].append(_title(method, seed, mode, title))
    return [_story(prompt, titles[prompt.story.id]) for prompt in comparison.prompts]


def _story(prompt: Prompt, titles: list[dict[str, Any]]) -> dict[str, Any]:
    body = " ".join(prompt.story.scraped_body.split())
    excerpt = cut(body, EXCERPT_LENGTH)
    return {
        "id": prompt.story.id,
        "url": prompt.story.url,
        "excerpt": excerpt if excerpt == body else f"{excerpt} …",
        "human_title": prompt.story.title.strip(),
        "titles": titles,
    }


def _title(method: Method, seed: int | None, mode: Mode, title: EvaluatedTitle) -> dict[str, Any]:
    return {
        "method": method.id,
        "seed": seed,
        "mode": mode_name(mode),
        "title": title.title,
        "reward": title.reward,
        "score": title.score,
        "heldout_score": title.heldout_score,
        "verdict": title.verdict,
        "failure": title.failure,
    }
