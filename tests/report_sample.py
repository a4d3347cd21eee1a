"""A report's data with everything a page must stand: two engines, three seeds, failures, nulls and nasty titles."""

from __future__ import annotations

import math
import random
from typing import Any

SEEDS = (1, 2, 3)
STEPS = 60
MEASURES = {"reward": 1.0, "score": 1.0, "heldout_score": 0.98, "matches": 0.3, "length": 14.0}
"""What a method's level is multiplied with, by measure."""
LEVELS = {
    "base": 2.21,
    "best_of_6": 3.02,
    "human": 2.63,
    "first_sentence": 1.92,
    "art_best": 3.14,
    "art_last": 3.11,
    "trl_best": 3.05,
    "trl_last": 2.96,
}
NAMES = {
    "base": "base model",
    "best_of_6": "base model, best of 6",
    "human": "human titles",
    "first_sentence": "first sentence",
    "art_best": "ART best",
    "art_last": "ART last",
    "trl_best": "TRL best",
    "trl_last": "TRL last",
}
NASTY = (
    "<script>alert(1)</script>",
    "</script><script>document.title='stolen'</script>",
    '"quoted" \'twice\' & <b onmouseover="alert(2)">bold</b>',
    "\u202eright to left, never closed",
    "Emoji 🚀🔥👩‍👩‍👧‍👦 and שלום עולם",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 2,
    "",
    "{{ 7 * 7 }} {% raw %} <!-- ]]> --!>",
    "<style>body{display:none}</style><img src=x onerror=document.title='stolen'>",
    "a lone surrogate \ud83d and a tab\there",
)
PLAIN = (
    "Ferrin Labs cuts build times by 38% with a new cache",
    "Show HN: A tiny database that fits in one file",
    "Why our queue stopped at 2,147,483,647 jobs",
    "Orbit 4.2 drops its garbage collector",
    "The city library now runs on donated laptops",
    "A compiler for spreadsheets, in 900 lines",
)


def sample_report() -> dict[str, Any]:
    """Return the same report each time."""
    luck = random.Random(7)
    runs = [_run(engine, seed, luck) for engine in ("art", "trl") for seed in SEEDS]
    return {
        "profile": "starter",
        "command": "hn-titles compare --profile starter --seeds 1,2,3",
        "created": "2026-01-02T03:04:05+00:00",
        "device": "2 CPU cores",
        "test_stories": 100,
        "seeds": list(SEEDS),
        "titles_per_story": {"sampled": 2, "best_of": 6},
        "engines": {
            "art": {
                "loss": "cispo",
                "formula": "The clipped ratio, held constant, weighs each token's log-probability times its advantage.",
                "learning_rate": 0.002,
                "updates_per_step": "one",
                "version": "0.5.18",
            },
            "trl": {
                "loss": "dapo",
                "formula": "The clipped ratio times the advantage, averaged over all tokens of the step.",
                "learning_rate": 0.003,
                "updates_per_step": "one",
                "version": "1.12.0",
            },
        },
        "same_loss": False,
        "runs": runs,
        "methods": [_method(method, luck) for method in LEVELS],
        "differences": _differences(),
        "guards": _guards(),
        "alarms": [
            "trl-2: the score that training saw rises by 0.42, the held-out one does not (0.01 [-0.05, 0.08]).",
        ],
        "conclusions": [
            "Both engines lift the reward of sampled titles to about 1.4 times the base model's: both gains are real.",
            "ART's best checkpoint earns 0.09 more than TRL's; the interval [-0.03, 0.21] contains 0, so this "
            "difference is too close to tell.",
            "Best-of-6 of the untrained base model comes close at six times the price of a title.",
            "Three seeds and 100 stories: a difference below about 0.1 cannot be seen here.",
        ],
        "stories": [_story(number, luck) for number in range(14)],
    }


def _interval(mean: float, width: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - width, "high": mean + 0.9 * width}


def _run(engine: str, seed: int, luck: random.Random) -> dict[str, Any]:
    pace = {"art": 4.1, "trl": 3.4}[engine] + 0.1 * seed
    top = {"art": 0.95, "trl": 0.85}[engine] + 0.04 * seed
    curve = []
    for step in range(STEPS + 1):
        level = 2.2 + top * (1 - math.exp(-step / 22))
        curve.append(
            {
                "step": step,
                "trajectories": step * 48,
                "tokens": step * (930 + 20 * seed),
                "seconds": step * pace,
                "device_seconds": step * pace,
                "cost": step * pace / 3600 * 0.12,
                "train_reward": None if step in (0, 17) else level + luck.gauss(0, 0.16),
                "val_reward": level + luck.gauss(0, 0.04) if step % 10 == 0 else None,
            }
        )
    last = curve[-1]
    return {
        "name": f"{engine}-{seed}",
        "engine": engine,
        "seed": seed,
        "steps": STEPS,
        "best_step": 50 if seed == 2 else STEPS,
        "train_seconds": last["seconds"],
        "device_seconds": last["device_seconds"],
        "cost": last["cost"],
        "trajectories": last["trajectories"],
        "trajectories_dropped": 7 * seed,
        "generated_tokens": last["tokens"],
        "peak_memory_mb": None if seed == 3 else 2711.4,
        "collapsed_at": 55 if (engine, seed) == ("trl", 2) else None,
        "mlflow_run_id": f"{engine}{seed}0f3c2b1a",
        "time_per_step": {"write": 0.52 * pace, "judge": 0.2 * pace, "train": 0.27 * pace, "other": 0.01 * pace},
        "curve": curve,
    }


def _method(method: str, luck: random.Random) -> dict[str, Any]:
    engine = method[:3] if method[:3] in ("art", "trl") else None
    text = method in ("human", "first_sentence")
    modes = ["text"] if text else ["sampled"] if method == "best_of_6" else ["sampled", "greedy"]
    return {
        "id": method,
        "name": NAMES[method],
        "engine": engine,
        "checkpoint": method[4:] if engine else None,
        "steps": [60, 50, 60] if engine else None,
        "modes": {
            mode: {
                **{
                    measure: _interval((LEVELS[method] + (0.4 if mode == "greedy" else 0)) * factor, 0.11 * factor)
                    for measure, factor in MEASURES.items()
                },
                "distinct": 0.9 + 0.1 * luck.random(),
                "titles": 600 if engine else 200,
                "failed": 3 if method == "base" else 0,
            }
            for mode in modes
        },
    }


def _differences() -> list[dict[str, Any]]:
    pairs = [
        ("art_best", "base"),
        ("trl_best", "base"),
        ("art_best", "trl_best"),
        ("art_best", "best_of_6"),
        ("trl_best", "human"),
    ]
    found = []
    for measure in ("reward", "score", "heldout_score", "matches"):
        for after, before in pairs:
            mean = (LEVELS[after] - LEVELS[before]) * MEASURES[measure]
            interval = _interval(mean, 0.12 * MEASURES[measure])
            real = interval["low"] > 0 or interval["high"] < 0
            found.append(
                {
                    "after": after,
                    "before": before,
                    "measure": measure,
                    "mode": "sampled",
                    "difference": interval,
                    "ratio": _interval(LEVELS[after] / LEVELS[before], 0.05) if measure == "reward" else None,
                    "win_rate": _interval(0.5 + mean / 3, 0.06) if measure == "reward" else None,
                    "real": real,
                    "sentence": f"{NAMES[after]} against {NAMES[before]}, {measure}: "
                    + ("the difference is real." if real else "too close to tell."),
                }
            )
    return found


def _guards() -> list[dict[str, Any]]:
    guards = []
    for method in LEVELS:
        shares = {
            "first_sentence": 1.0 if method == "first_sentence" else 0.03,
            "too_long": 0.01,
            "very_short": 0.005,
            "emoji": 0.0,
            "all_caps": 0.17 if method == "trl_best" else 0.02,
            "validator_words": 0.0,
        }
        warnings = ["17% of its titles are all in capitals, 2% of the base model's."]
        guards.append(
            {
                "method": method,
                "mode": "text" if method in ("human", "first_sentence") else "sampled",
                "shares": shares,
                "warnings": warnings if method == "trl_best" else [],
            }
        )
    return guards


def _story(number: int, luck: random.Random) -> dict[str, Any]:
    texts = NASTY + PLAIN
    human = texts[number % len(texts)]
    titles = []
    for method in LEVELS:
        modes = _method(method, luck)["modes"]
        seeds = SEEDS if method[:3] in ("art", "trl") else (None,)
        for mode in modes:
            count = 2 if mode == "sampled" and method != "best_of_6" else 1
            for seed in seeds:
                titles += [
                    _title(method, seed, mode, human if method == "human" else luck.choice(texts), luck)
                    for _ in range(count)
                ]
    if number == 3:
        lost = {"reward": None, "score": None, "heldout_score": None, "verdict": None}
        titles[0] |= lost | {"failure": "validator: UnreadableVerdict: <maybe>"}
        titles[1] |= lost | {"title": None, "failure": "validator: ServiceUnavailable: no answer in 30 s"}
    return {
        "id": f"story-{number}",
        "url": f'https://example.com/{number}?q="><script>alert(4)</script>'
        if number == 1
        else f"example.com/{number}",
        "excerpt": (human + " A body tells more than its title. ") * 3,
        "human_title": human,
        "titles": titles,
    }


def _title(method: str, seed: int | None, mode: str, text: str, luck: random.Random) -> dict[str, Any]:
    score = LEVELS[method] + luck.gauss(0, 0.5)
    verdict = luck.random() > 0.12
    return {
        "method": method,
        "seed": seed,
        "mode": mode,
        "title": text,
        "reward": score if verdict else 0.0,
        "score": score,
        "heldout_score": score - 0.05,
        "verdict": verdict,
        "failure": None,
    }
