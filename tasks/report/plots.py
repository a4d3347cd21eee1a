"""The report's plots as SVG.

They are written element by element, so that the page's style sheet gives them their colours (in the light and in
the dark) and their letters the size of the page's. Every plot is 340 units wide, about the pixels of a phone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tasks.engines.reward_curve import smoothed

Point = tuple[float, float]

ENGINE_NAMES = {"art": "ART", "trl": "TRL"}
TIME_PARTS = ("write", "judge", "train", "other")
_WIDTH = 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 30, 12, 20, 38
_LETTER = 6.4
"""Width of a letter, on the safe side, at the plots' 12 units a line."""


@dataclass(frozen=True)
class Budget:
    """Something that a run spends, to draw the reward against."""

    key: str
    """Its name in a curve's entries."""
    name: str
    unit: str
    is_time: bool = False


BUDGETS = (
    Budget("step", "steps", "steps (policy updates)"),
    Budget("trajectories", "trajectories", "trajectories"),
    Budget("seconds", "wall clock", "of wall clock", is_time=True),
    Budget("tokens", "generated tokens", "generated tokens"),
    Budget("device_seconds", "device time", "of device time", is_time=True),
    Budget("cost", "money", "money, at the profile's price"),
)


@dataclass(frozen=True)
class Reference:
    """A horizontal line to compare the curves with."""

    method: str
    name: str
    reward: float


def reward_plot(runs: Sequence[Mapping[str, Any]], budget: Budget, references: Sequence[Reference]) -> Markup:
    """Draw reward against what was spent: training reward as lines, validation reward as points.

    Each engine's thick line is the mean over its seeds, at the steps that all of them have, and over the last few
    steps; each seed is a thin one, as it was.
    """
    curves: dict[str, list[Sequence[Mapping[str, Any]]]] = {}
    for run in runs:
        curves.setdefault(run["engine"], []).append(run["curve"])
    divisor, unit = 1.0, budget.unit
    spent = [entry[budget.key] for run in runs for entry in run["curve"]]
    if budget.is_time:
        divisor, name = _time_unit(max(spent, default=0.0))
        unit = f"{name} {unit}"
    rewards = [reference.reward for reference in references]
    rewards += [
        entry[key]
        for run in runs
        for entry in run["curve"]
        for key in ("train_reward", "val_reward")
        if entry[key] is not None
    ]
    height = 240
    margin = 0.04 * ((max(rewards) - min(rewards)) or 1.0)
    x = _scale(0.0, max(spent) / divisor, _LEFT, _WIDTH - _RIGHT)
    y = _scale(min(rewards) - margin, max(rewards) + margin, height - _BOTTOM, _TOP)
    parts = [
        *_y_grid(y, min(rewards) - margin, max(rewards) + margin),
        *_x_axis(x, max(spent) / divisor, height - _BOTTOM, unit),
    ]
    for reference in references:
        parts.append(
            Markup('<line class="reference {}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                reference.method, _LEFT, _WIDTH - _RIGHT, _short(y(reference.reward)), _short(y(reference.reward))
            )
        )

    def place(points: Sequence[Point]) -> list[Point]:
        return [(x(spent / divisor), y(reward)) for spent, reward in points]

    said = []
    for engine, of_engine in curves.items():
        for curve in of_engine:
            parts.append(_line(place(mean_points([curve], budget.key, "train_reward")), f"seed {engine}"))
    for engine, of_engine in curves.items():
        points = mean_points(of_engine, budget.key, "train_reward")
        means = smoothed([reward for _, reward in points])
        parts.append(
            _line(place([(spent, mean) for (spent, _), mean in zip(points, means, strict=True)]), f"mean {engine}")
        )
    for engine, of_engine in curves.items():
        points = mean_points(of_engine, budget.key, "val_reward")
        parts += [
            _marker(*where, engine, f"{ENGINE_NAMES[engine]}, validation: {point[1]:.2f}")
            for where, point in zip(place(points), points, strict=True)
        ]
        if points:
            said.append(
                f"{ENGINE_NAMES[engine]}'s validation reward goes from {points[0][1]:.2f} to {points[-1][1]:.2f} after "
                f"{compact(points[-1][0] / divisor)} {unit}."
            )
    said += [f"{reference.name}: {reference.reward:.2f} on the test stories." for reference in references]
    return _svg(height, " ".join([f"Reward against {budget.name}.", *said]), parts)


def mean_points(curves: Sequence[Sequence[Mapping[str, Any]]], spent: str, reward: str) -> list[Point]:
    """Return the mean over `curves` of what was spent and of the reward, at each step where all have a reward."""
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for curve in curves:
        for entry in curve:
            if entry[reward] is not None:
                by_step.setdefault(entry["step"], []).append(entry)
    return [
        (statistics.fmean(entry[spent] for entry in entries), statistics.fmean(entry[reward] for entry in entries))
        for _, entries in sorted(by_step.items())
        if len(entries) == len(curves)
    ]


def forest_plot(
    differences: Sequence[Mapping[str, Any]], methods: Mapping[str, Mapping[str, Any]], measure: str
) -> Markup:
    """Draw each difference with its interval beside 0; filled where the interval leaves 0 out."""
    row, top = 38, 4
    bottom = top + row * len(differences)
    reach = [0.0, *(difference["difference"][end] for difference in differences for end in ("low", "high"))]
    low, high = min(reach), max(reach)
    x = _scale(low, high, 8, _WIDTH - 56)
    parts = [
        *_x_axis(x, high, bottom, f"difference in {measure}", low=low, grid_from=top),
        Markup('<line class="zero" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(_short(x(0)), top, bottom),
    ]
    said = []
    for number, difference in enumerate(differences):
        interval = difference["difference"]
        name = f"{methods[difference['after']]['name']} minus {methods[difference['before']]['name']}"
        engine = methods[difference["after"]]["engine"]
        certainty = "real" if difference["real"] else "unsure"
        label, line = top + row * number + 13, top + row * number + 25
        parts += [
            Markup('<text class="label" x="0" y="{}">{}</text>').format(label, _cut(name)),
            Markup('<line class="whisker {} {}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                engine or "plain", certainty, _short(x(interval["low"])), _short(x(interval["high"])), line, line
            ),
            _marker(x(interval["mean"]), line, engine, difference["sentence"], certainty),
            Markup('<text class="figure" text-anchor="end" x="{}" y="{}">{}</text>').format(
                _WIDTH, line + 4, f"{interval['mean']:+.2f}"
            ),
        ]
        said.append(f"{name}: {interval['mean']:+.2f}, {'real' if difference['real'] else 'too close to tell'}.")
    return _svg(bottom + _BOTTOM, " ".join([f"Differences in {measure}.", *said]), parts)


def time_split_plot(seconds: Mapping[str, Mapping[str, float]]) -> Markup:
    """Draw the mean seconds of a step, by engine and part of the step (`TIME_PARTS`), as stacked bars."""
    row, top = 54, 4
    bottom = top + row * len(seconds)
    longest = max((sum(parts.values()) for parts in seconds.values()), default=0.0)
    x = _scale(0.0, longest, 4, _WIDTH - _RIGHT)
    parts = _x_axis(x, longest, bottom, "seconds a step", grid_from=top)
    said = []
    for number, (engine, split) in enumerate(seconds.items()):
        y, start = top + row * number + 20, 0.0
        parts.append(
            Markup('<text class="label" x="4" y="{}">{}: {} s a step</text>').format(
                y - 6, ENGINE_NAMES[engine], f"{sum(split.values()):.2f}"
            )
        )
        for part in TIME_PARTS:
            left, width = x(start), x(start + split[part]) - x(start)
            parts.append(
                Markup(
                    '<rect class="part {}" x="{}" y="{}" width="{}" height="24"><title>{}, {}: {} s</title></rect>'
                ).format(part, _short(left), y, _short(width), ENGINE_NAMES[engine], part, f"{split[part]:.2f}")
            )
            figure = f"{split[part]:.2f}"
            if width > _LETTER * len(figure) + 4:
                parts.append(
                    Markup('<text class="in-part" text-anchor="middle" x="{}" y="{}">{}</text>').format(
                        _short(left + width / 2), y + 16, figure
                    )
                )
            start += split[part]
        said.append(f"{ENGINE_NAMES[engine]}: " + ", ".join(f"{p} {split[p]:.2f} s" for p in TIME_PARTS) + ".")
    return _svg(bottom + _BOTTOM, " ".join(["Time of a step by what it is spent on.", *said]), parts)


def interval_bar(
    interval: Mapping[str, float], engine: str | None, low: float, high: float, base: float | None
) -> Markup:
    """Draw one interval on a scale from `low` to `high`, with a tick where the base model's mean is."""
    x = _scale(low, high, 4, 126)
    parts = [
        Markup('<line class="band {}" x1="{}" x2="{}" y1="8" y2="8"/>').format(
            engine or "plain", _short(x(interval["low"])), _short(x(interval["high"]))
        ),
        Markup('<line class="middle {0}" x1="{1}" x2="{1}" y1="2" y2="14"/>').format(
            engine or "plain", _short(x(interval["mean"]))
        ),
    ]
    if base is not None:
        parts.insert(0, Markup('<line class="zero" x1="{0}" x2="{0}" y1="0" y2="16"/>').format(_short(x(base))))
    return Markup('<svg class="bar" viewBox="0 0 130 16" aria-hidden="true">{}</svg>').format(Markup("").join(parts))


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return the round values from `low` to `high`, 1, 2 or 5 times a power of ten apart: at most `most` + 1."""
    if high <= low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [round(number * step, 12) for number in numbers]


def compact(value: float) -> str:
    """Return a number in a few letters: 0.5, 20, 1,500, 20k, 1.2M."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.4g}k"
    return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.4g}"


def _time_unit(longest: float) -> tuple[float, str]:
    """Return the unit that suits so many seconds: how many seconds it has, and its name."""
    return next((unit for unit in ((1.0, "seconds"), (60.0, "minutes")) if longest <= 600 * unit[0]), (3600.0, "hours"))


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    width = (high - low) or 1.0
    return lambda value: start + (value - low) / width * (end - start)


def _y_grid(y: Callable[[float], float], low: float, high: float) -> list[Markup]:
    parts = [Markup('<text x="0" y="10">reward</text>')]
    for tick in ticks(low, high, 6):
        at = _short(y(tick))
        parts += [
            Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(_LEFT, _WIDTH - _RIGHT, at, at),
            Markup('<text text-anchor="end" x="{}" y="{}">{}</text>').format(
                _LEFT - 5, _short(y(tick) + 4), compact(tick)
            ),
        ]
    return parts


def _x_axis(
    x: Callable[[float], float], high: float, at: float, unit: str, *, low: float = 0.0, grid_from: float | None = None
) -> list[Markup]:
    """Return ticks below `at`, the unit's name below them, and grid lines upwards to `grid_from` if given."""
    parts = []
    for tick in ticks(low, high, 7):
        where = _short(x(tick))
        parts.append(
            Markup('<line class="grid" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(
                where, at if grid_from is None else grid_from, at + 4
            )
        )
        parts.append(Markup('<text text-anchor="middle" x="{}" y="{}">{}</text>').format(where, at + 17, compact(tick)))
    parts.append(Markup('<text text-anchor="end" x="{}" y="{}">{}</text>').format(_WIDTH - _RIGHT, at + 33, unit))
    return parts


def _line(points: Sequence[Point], style: str) -> Markup:
    where = " ".join(f"{_short(x)},{_short(y)}" for x, y in points)
    return Markup('<polyline class="{}" points="{}"/>').format(style, where)


def _marker(x: float, y: float, engine: str | None, hint: str, style: str = "real") -> Markup:
    """Return a point: a square for TRL and a disc for the others, so that colour is not the only difference."""
    title = Markup("<title>{}</title>").format(hint)
    if engine == "trl":
        shape = '<rect class="point trl {}" x="{}" y="{}" width="8" height="8">{}</rect>'
        return Markup(shape).format(style, _short(x - 4), _short(y - 4), title)
    shape = '<circle class="point {} {}" cx="{}" cy="{}" r="4.5">{}</circle>'
    return Markup(shape).format(engine or "plain", style, _short(x), _short(y), title)


def _cut(text: str) -> str:
    """Return `text` at a length that fits one line of a plot."""
    most = int(_WIDTH / _LETTER)
    return text if len(text) <= most else text[: most - 1] + "…"


def _short(value: float) -> str:
    """Return a coordinate; a tenth of a unit is a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def _svg(height: float, words: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg class="plot" role="img" aria-label="{}" viewBox="0 0 {} {}">{}</svg>').format(
        words, _WIDTH, _short(height), Markup("\n").join(parts)
    )
