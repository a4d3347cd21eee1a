"""How far a training is: a line, a report in Markdown and a table of titles, made of its steps' metrics."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from tasks.titles import metric_names as names
from tasks.titles.summary import markdown_table

Rows = Mapping[int, Mapping[str, float]]
"""The metrics of every step so far; row 0 holds the validation of the untrained policy, where there is one yet."""

# A single step's reward jumps with its stories, and one with a validation takes longer than others.
WINDOW = 10
_BARS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 60
_MEASURES = {
    "reward": (names.TRAIN_REWARD, names.VAL_REWARD),
    "score": (names.TRAIN_SCORE, names.VAL_SCORE),
    "supported": (names.TRAIN_MATCHES, names.VAL_MATCHES),
    "length": (names.TRAIN_LENGTH, names.VAL_LENGTH),
}


def headline(rows: Rows, max_steps: int) -> str:
    """Return step, rewards and time left in one line."""
    if not rows:
        return f"Starting, {max_steps} steps to go"
    step = max(rows)
    parts = [f"Step {step} of {max_steps}"]
    trained = list(_values(rows, names.TRAIN_REWARD).values())[-WINDOW:]
    if trained:
        parts.append(f"reward {_mean(trained):.2f}")
    left = seconds_left(rows, max_steps)
    if step < max_steps and left is not None:
        parts.append(f"{duration(left)} left")
    validated = _values(rows, names.VAL_REWARD_MEAN)
    if validated:
        parts.append(f"validation {validated[max(validated)]:.2f}")
    return " · ".join(parts)


def report(rows: Rows, max_steps: int, links: Sequence[str] = ()) -> str:
    """Return the state of a training as Markdown; `links` are lines that lead to MLflow and the run's folder."""
    parts = [f"## {headline(rows, max_steps)}"]
    trained = _values(rows, names.TRAIN_REWARD)
    table = markdown_table(_measure_rows(rows))
    if table:
        parts.append(table)
    if len(trained) > 1:
        parts.append(f"Training reward, steps {min(trained)} to {max(trained)}: `{curve(list(trained.values()))}`")
    parts.append("\n".join(f"* {line}" for line in [*_facts(rows), *links]))
    return "\n\n".join(parts) + "\n"


def title_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a validation's titles (rows of `ledger.validation_rows`) as they are read best: the title first."""
    return [
        {
            "title": row["title"],
            "reward": round(row["reward"], 2),
            "score": round(row["score"], 2),
            "supported": "yes" if row["verdict"] else "no",
            "human title": row["human_title"],
            "story": row["story_id"],
        }
        for row in rows
    ]


def seconds_left(rows: Rows, max_steps: int) -> float | None:
    """Return the seconds that the steps to come take at the pace of the last ones, None before the first step's end."""
    elapsed = _values(rows, names.TIME_ELAPSED)
    if len(elapsed) < 2:
        return None
    steps = sorted(elapsed)[-WINDOW - 1 :]
    first, last = steps[0], steps[-1]
    return (elapsed[last] - elapsed[first]) / (last - first) * (max_steps - last)


def curve(values: Sequence[float]) -> str:
    """Return a curve of block characters from the lowest to the highest value, each of them a mean of neighbours."""
    count = min(len(values), _CURVE_WIDTH)
    edges = [round(place * len(values) / count) for place in range(count + 1)]
    means = [_mean(values[start:end]) for start, end in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join(_BARS[round((mean - low) / span * (len(_BARS) - 1)) if span else 0] for mean in means)


def duration(seconds: float) -> str:
    """Return `40 s`, `12 min` or `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _measure_rows(rows: Rows) -> list[dict[str, str]]:
    """One row for each measure: training at its start and now, validation at its start, at its best and now."""
    validated = _values(rows, names.VAL_REWARD_MEAN)
    trained = sorted(_values(rows, names.TRAIN_REWARD))
    columns: dict[str, tuple[int, list[int]]] = {}
    if trained:
        window = min(WINDOW, max(1, len(trained) // 2))
        early, late = trained[:window], trained[-window:]
        columns[f"training, {_steps(early)}"] = (0, early)
        columns[f"training, {_steps(late)}"] = (0, late)
    if validated:
        best = max(validated, key=lambda step: validated[step])
        for step in sorted({min(validated), best, max(validated)}):
            columns[f"validation, step {step}{' (best)' if step == best else ''}"] = (1, [step])
    table = []
    for measure, keys in _MEASURES.items():
        row = {"": measure}
        for heading, (kind, steps) in columns.items():
            key = f"{keys[1]}/mean" if kind else keys[0]
            found = [rows[step][key] for step in steps if key in rows[step]]
            row[heading] = _format(measure, _mean(found)) if found else "-"
        table.append(row)
    return table if columns else []


def _facts(rows: Rows) -> list[str]:
    dropped = sum(_values(rows, names.TRAIN_TRAJECTORIES_DROPPED).values())
    kept = sum(_values(rows, names.TRAIN_TRAJECTORIES).values())
    in_validation = sum(_values(rows, names.VAL_TRAJECTORIES_DROPPED).values())
    facts = [f"Dropped trajectories: {dropped:,.0f} of {kept + dropped:,.0f}, and {in_validation:,.0f} in validations"]
    elapsed = _values(rows, names.TIME_ELAPSED)
    if elapsed:
        facts.append(f"Trained for {duration(max(elapsed.values()))}")
    alarms = [step for step, value in _values(rows, names.TRAIN_COLLAPSED).items() if value]
    if alarms:
        facts.append(f"**The reward collapsed at step {min(alarms)}: lower the learning rate.**")
    return facts


def _values(rows: Rows, name: str) -> dict[int, float]:
    return {step: rows[step][name] for step in sorted(rows) if name in rows[step]}


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _steps(steps: Sequence[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def _format(measure: str, value: float) -> str:
    if measure == "supported":
        return f"{value:.0%}"
    return f"{value:.0f}" if measure == "length" else f"{value:.2f}"
