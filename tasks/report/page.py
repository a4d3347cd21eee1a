"""The comparison as one HTML page that opens offline.

Everything is inside: style, script and plots. Titles and bodies come from models and from strangers: the template
escapes them, no script reads them as HTML, and the page's content security policy allows only its own style and
script, by their hashes, and no address at all.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tasks.engines.reward_curve import WINDOW
from tasks.report import plots
from tasks.titles.guards import GROWTH
from tasks.titles.summary import DIGITS, HEADINGS

FOLDED = ("first_sentence", "art_last", "trl_last")
"""Methods whose titles are folded away at first, so that the others have room on a screen."""
GUARDS = {
    "first_sentence": "repeats the first sentence",
    "too_long": "over 80 characters",
    "very_short": "very short",
    "emoji": "emoji",
    "all_caps": "all caps",
    "validator_words": "validator's words",
}
_MEASURES = ("score", "heldout_score", "matches", "length")
_ROOM = Path(__file__).parent


def render(report: Mapping[str, Any]) -> str:
    """Return the page of a comparison's `report` (what report.json holds); the same report gives the same page.

    Raises `jinja2.UndefinedError` or `KeyError` where the report lacks a key.
    """
    environment = Environment(
        loader=FileSystemLoader(_ROOM),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"figure": _figure, "heading": _heading, "percent": _percent, "compact": plots.compact}
    style, script = ((_ROOM / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    methods = {method["id"]: method for method in report["methods"]}
    references = _references(methods)
    page = environment.get_template("template.html.j2").render(
        report=report,
        methods=methods,
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'",
        engine_names=plots.ENGINE_NAMES,
        time_parts=plots.TIME_PARTS,
        guards=GUARDS,
        growth=f"{100 * GROWTH:.0f}",
        guard_rows=_guard_rows(report["guards"]),
        warnings=[
            f"{methods[guard['method']]['name']} ({guard['mode']}): {warning}"
            for guard in report["guards"]
            for warning in guard["warnings"]
        ],
        measures=_MEASURES,
        results=_results(report["methods"]),
        differences=_differences(report["differences"], methods),
        references=references,
        reward_plots=_reward_plots(report["runs"], references),
        window=WINDOW,
        time_split=plots.time_split_plot(_time_split(report["runs"])),
        stories=[_story(story) for story in report["stories"]],
        columns=[method for method in report["methods"] if method["id"] != "human"],
        folded=FOLDED,
        first_seed=report["seeds"][0] if report["seeds"] else None,
    )
    # A lone surrogate (half an emoji, cut by a model) has no UTF-8 form; the page could not be written to disk.
    return page.encode("utf-8", "replace").decode("utf-8")


def _references(methods: Mapping[str, Mapping[str, Any]]) -> list[plots.Reference]:
    """Return the lines that the curves are compared with: test rewards of what was not trained."""
    found = []
    for name, mode in (("base", "sampled"), ("best_of_6", "sampled"), ("human", "text")):
        interval = methods[name]["modes"][mode]["reward"] if name in methods else None
        if interval:
            found.append(plots.Reference(name, methods[name]["name"], interval["mean"]))
    return found


def _reward_plots(
    runs: Sequence[Mapping[str, Any]], references: Sequence[plots.Reference]
) -> list[tuple[plots.Budget, Markup]]:
    """Return a plot for everything that all runs know to have spent; money is unknown where no price was given."""
    known = [b for b in plots.BUDGETS if runs and all(entry[b.key] is not None for r in runs for entry in r["curve"])]
    return [(budget, plots.reward_plot(runs, budget, references)) for budget in known]


def _time_split(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return each engine's seconds of a step by part: the mean over its runs."""
    splits: dict[str, list[Mapping[str, float]]] = {}
    for run in runs:
        splits.setdefault(run["engine"], []).append(run["time_per_step"])
    return {
        engine: {part: sum(split[part] for split in of_engine) / len(of_engine) for part in plots.TIME_PARTS}
        for engine, of_engine in splits.items()
    }


def _results(methods: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the table of results: what the comparison rests on first, greedy titles after it."""
    rows = [
        {"method": method, "mode": mode, **figures} for method in methods for mode, figures in method["modes"].items()
    ]
    rows.sort(key=lambda row: row["mode"] == "greedy")
    rewards = [row["reward"] for row in rows if row["reward"]]
    low = min((reward["low"] for reward in rewards), default=0.0)
    high = max((reward["high"] for reward in rewards), default=0.0)
    base = next((row["reward"]["mean"] for row in rows if row["method"]["id"] == "base" and row["reward"]), None)
    for row in rows:
        bar = plots.interval_bar(row["reward"], row["method"]["engine"], low, high, base) if row["reward"] else ""
        row["bar"] = bar
    return rows


def _differences(
    differences: Sequence[Mapping[str, Any]], methods: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the differences by measure, in the report's order, each with its forest plot."""
    by_measure: dict[str, list[Mapping[str, Any]]] = {}
    for difference in differences:
        by_measure.setdefault(difference["measure"], []).append(difference)
    return [
        {
            "measure": measure,
            "rows": rows,
            "real": sum(row["real"] for row in rows),
            "plot": plots.forest_plot([row for row in rows if row["difference"]], methods, _heading(measure)),
        }
        for measure, rows in by_measure.items()
    ]


def _guard_rows(guards: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return each guard with the names of the shares that it warns of."""
    base = {guard["mode"]: guard["shares"] for guard in guards if guard["method"] == "base"}
    rows = []
    for guard in guards:
        before = base.get(guard["mode"], {})
        grown = [
            name
            for name, share in guard["shares"].items()
            if guard["warnings"] and share - before.get(name, 0.0) > GROWTH
        ]
        rows.append({**guard, "grown": grown})
    return rows


def _story(story: Mapping[str, Any]) -> dict[str, Any]:
    """Return a story with its titles by method."""
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for title in story["titles"]:
        by_method.setdefault(title["method"], []).append(title)
    return {**story, "by_method": by_method}


def _figure(value: float | None, measure: str = "reward") -> str:
    """Return a figure with the digits that suit its measure; a dash where there is none."""
    return "-" if value is None else f"{value:,.{DIGITS.get(measure, 2)}f}"


def _percent(share: float, digits: int = 0) -> str:
    return f"{share:.{digits}%}"


def _heading(measure: str) -> str:
    return HEADINGS.get(measure, measure)


def _hash(text: str) -> str:
    """Return the source expression by which a content security policy allows exactly this inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
