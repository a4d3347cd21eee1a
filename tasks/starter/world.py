"""The starter world: seeded stories with facts, titles that are or aren't supported, and upvote scores.

Nothing here is real news. A `Tale` is drawn from a kind of story in `texts.py`: its facts fill slots,
8 to 14 sentences tell them in varied order and wording, and some of the sentences are distractors that
name other companies, people and figures of the same units. Titles come in styles, from vague to one that
names who, what, how much and why; an unsupported title changes one thing (a figure, a name, a direction)
or invents an outcome.

The score is drawn from a log-normal distribution. Its mean in log upvotes is

    2.1 + popularity of the kind + effect of the title's style + 0.25 * (size of the figure, if named)
        + effect of the submitter + 0.3 * (it is Tuesday to Thursday) - 0.6 * (the title exceeds 75 characters)

and its standard deviation 0.8. Whether the title is supported has no effect: people vote before they read.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from tasks.starter import texts, words
from tasks.titles.story import Split, Story

STORY_COUNT = 12_000
SEED = 2026

STYLE_EFFECT = {
    "cause": 1.3,
    "figure": 0.9,
    "how": 0.5,
    "plain": 0.0,
    "person": -0.2,
    "question": -0.5,
    "clickbait": -0.8,
    "vague": -1.1,
}
"""What a title's style adds to the expected log score."""
STYLE_SHARE = {
    "plain": 0.24,
    "figure": 0.16,
    "cause": 0.06,
    "how": 0.10,
    "person": 0.10,
    "question": 0.12,
    "clickbait": 0.10,
    "vague": 0.12,
}
"""How often people choose each style."""
HUMAN_MISTAKES = 0.06
"""Share of human titles that claim something the body does not say."""
SCORE_NOISE = 0.8
_FACTUAL = ("cause", "figure", "how", "plain")
_SWAPPABLE = ("n", "k", "co", "pr", "pe", "rv", "te", "why", "ci", "da")
_REGULARS = 60
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Tale:
    """The facts of one story and the body that tells them."""

    kind: str
    slots: dict[str, str]
    others: dict[str, tuple[str, ...]] = field(repr=False)
    """Names and figures of the distractor sentences, by type."""
    body: str
    figure_size: float
    """The main figure's place in its range, from -1 to 1."""


def tell(rng: random.Random) -> Tale:
    """Draw a story's facts and tell them in 8 to 14 sentences."""
    kind_name = rng.choice(sorted(texts.KINDS))
    kind = texts.KINDS[kind_name]
    numbers = _distinct_numbers(rng)
    figure, size = _figure(rng, kind.units[0], numbers)
    slots = {
        "co": company(rng),
        "pr": product(rng),
        "pe": person(rng),
        "rv": company(rng),
        "ci": rng.choice(words.CITIES),
        "da": f"{rng.choice(words.MONTHS)} {rng.randint(1, 28)}",
        "te": rng.choice(words.LANGUAGES),
        "why": rng.choice(words.REASONS[kind_name]),
        "topic": kind.topic,
        "n": figure,
        "m": _figure(rng, kind.units[1], numbers)[0],
        "k": _figure(rng, kind.units[2], numbers)[0],
    }
    length = rng.randint(8, 14)
    distractors, others = _distractors(rng, kind, slots, numbers, rng.randint(2, 4))
    optional = [rng.choice(group) for group in kind.more]
    rng.shuffle(optional)
    told = [rng.choice(group) for group in kind.core]
    told += optional[: max(0, length - len(told) - len(distractors))]
    sentences = [template.format(**slots) for template in told]
    lead, rest = sentences[0], sentences[1:] + distractors
    while len(rest) + 1 < length:
        extra, more_others = _distractors(rng, kind, slots, numbers, 1)
        if extra[0] not in rest:
            rest += extra
            others = {key: others[key] + more_others[key] for key in others}
    rng.shuffle(rest)
    rest.insert(0 if rng.random() < 0.7 else rng.randint(1, 3), lead)
    body = rest[0]
    for sentence in rest[1:]:
        body += ("\n\n" if rng.random() < 0.15 else " ") + sentence
    return Tale(kind_name, slots, others, body, size)


def supported_titles(tale: Tale) -> dict[str, list[str]]:
    """Return every title that the body supports, by style."""
    titles = {}
    for style, templates in _templates(tale).items():
        titles[style] = [
            template.format(**tale.slots)
            for template in templates
            if all(slot == "topic" or tale.slots[slot] in tale.body for slot in _SLOT.findall(template))
        ]
    return {style: found for style, found in titles.items() if found}


def supported_title(rng: random.Random, tale: Tale) -> tuple[str, str]:
    """Draw a style as people do and return it with a supported title."""
    titles = supported_titles(tale)
    styles = sorted(titles)
    style = rng.choices(styles, [STYLE_SHARE[style] for style in styles])[0]
    return style, rng.choice(titles[style])


def unsupported_title(rng: random.Random, tale: Tale) -> tuple[str, str]:
    """Return a style and a title with exactly one thing that the body does not say."""
    titles = supported_titles(tale)
    supported = {title for found in titles.values() for title in found}
    while True:
        # Half of the mistakes are made in the factual styles, where there is most to get wrong.
        style = rng.choice(_FACTUAL) if rng.random() < 0.75 else rng.choice(sorted(texts.COMMON_TITLES))
        if style not in titles:
            continue
        title = rng.choice(titles[style])
        spoilt = rng.choices((_swapped, _flipped, _with_invention), (0.74, 0.1, 0.16))[0](rng, tale, style, title)
        if spoilt is not None and spoilt not in supported:
            return style, spoilt


def human_title(rng: random.Random, tale: Tale) -> tuple[str, str]:
    """Return a style and the title a person would submit: mostly supported, of every quality."""
    if rng.random() < HUMAN_MISTAKES:
        return unsupported_title(rng, tale)
    return supported_title(rng, tale)


def expected_log_score(tale: Tale, style: str, title: str, by: str, time: datetime) -> float:
    """Return the mean of the log score, as the module's docstring documents it."""
    named = re.search(r"\d", title) is not None
    return (
        2.1
        + texts.KINDS[tale.kind].popularity
        + STYLE_EFFECT[style]
        + (0.25 * tale.figure_size if named else 0.0)
        + _submitter_effect(by)
        + (0.3 if time.weekday() in (1, 2, 3) else 0.0)
        - (0.6 if len(title) > 75 else 0.0)
    )


def generate_stories(count: int = STORY_COUNT, seed: int = SEED) -> list[Story]:
    """Return `count` stories; the same seed gives the same stories, and a longer list begins with a shorter one."""
    return [_story(index, seed) for index in range(count)]


def split_of(story_id: str) -> Split:
    """Return the split that a hash of the id puts a story in: 84% train, 8% validation, 8% test."""
    bucket = int(hashlib.sha256(story_id.encode()).hexdigest()[:8], 16) % 100
    return "train" if bucket < 84 else "val" if bucket < 92 else "test"


def company(rng: random.Random) -> str:
    """Return a company's name."""
    return rng.choice(words.COMPANY_STARTS) + rng.choice(words.COMPANY_ENDS)


def product(rng: random.Random) -> str:
    """Return a product's name."""
    return rng.choice(words.PRODUCT_STARTS) + rng.choice(words.PRODUCT_ENDS)


def person(rng: random.Random) -> str:
    """Return a person's name."""
    return f"{rng.choice(words.FIRST_NAMES)} {rng.choice(words.LAST_NAMES)}"


def _story(index: int, seed: int) -> Story:
    story_id = f"starter-{seed}-{index}"
    rng = random.Random(story_id)
    tale = tell(rng)
    style, title = human_title(rng, tale)
    by = f"regular{rng.randrange(_REGULARS)}" if rng.random() < 0.5 else f"{person(rng).replace(' ', '').lower()}"
    time = datetime(2023, 1, 1, tzinfo=UTC) + timedelta(minutes=rng.randrange(60 * 24 * 900))
    mean = expected_log_score(tale, style, title, by, time)
    score = max(1, round(math.exp(rng.gauss(mean, SCORE_NOISE))))
    url = f"https://{tale.slots['co'].lower()}.example/{time:%Y}/{index}"
    return Story(story_id, by, time, title, url, score, tale.body, split_of(story_id))


def _submitter_effect(by: str) -> float:
    if not by.startswith("regular"):
        return 0.0
    return random.Random(by).gauss(0.0, 0.3)


def _templates(tale: Tale) -> dict[str, tuple[str, ...]]:
    return {**texts.KINDS[tale.kind].titles, **texts.COMMON_TITLES}


def _distinct_numbers(rng: random.Random) -> list[int]:
    numbers = list(range(2, 100)) + list(range(100, 1000, 7))
    rng.shuffle(numbers)
    return numbers


def _figure(rng: random.Random, unit: str, numbers: list[int]) -> tuple[str, float]:
    """Take an unused number that suits the unit; return the figure and its size from -1 to 1."""
    highest = 97 if unit.endswith(("percent", "hours", "months", "weekends", "years", "offices")) else 999
    index = next(i for i, number in enumerate(numbers) if number <= highest)
    number = numbers.pop(index)
    return unit.replace("#", str(number)), 2 * math.log(number / 2) / math.log(highest / 2) - 1


def _distractors(
    rng: random.Random, kind: texts.Kind, slots: dict[str, str], numbers: list[int], count: int
) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    sentences: list[str] = []
    others: dict[str, tuple[str, ...]] = {"co": (), "pr": (), "pe": (), "ci": (), "n": ()}
    for template in rng.sample(texts.DISTRACTORS, count):
        unit = kind.units[0] if rng.random() < 0.7 else rng.choice(kind.units)
        names = {
            "ox": company(rng),
            "op": product(rng),
            "oy": person(rng),
            "oz": rng.choice([city for city in words.CITIES if city != slots["ci"]]),
            "fig": _figure(rng, unit, numbers)[0],
        }
        sentences.append(template.format(**names, topic=slots["topic"]))
        for key, name in (("co", "ox"), ("pr", "op"), ("pe", "oy"), ("ci", "oz"), ("n", "fig")):
            if "{" + name + "}" in template:
                others[key] += (names[name],)
    return sentences, others


def _swapped(rng: random.Random, tale: Tale, style: str, title: str) -> str | None:
    """Replace one told fact by another of its type."""
    present = [
        slot for slot in ("n", "k", "co", "pr", "pe", "rv", "te", "why", "ci", "da") if tale.slots[slot] in title
    ]
    if not present:
        return None
    slot = rng.choice(present)
    true = tale.slots[slot]
    false = _other_value(rng, tale, slot, true, may_be_told=style in _FACTUAL)
    return None if false is None or false == true else title.replace(true, false)


def _other_value(rng: random.Random, tale: Tale, slot: str, true: str, *, may_be_told: bool) -> str | None:
    if slot in ("n", "k"):
        told = [tale.slots["m"], tale.slots["k"], tale.slots["n"], *tale.others["n"]]
        unit = re.sub(r"\d+", "#", true)
        same_unit = [figure for figure in told if re.sub(r"\d+", "#", figure) == unit and figure != true]
        if same_unit and rng.random() < 0.5:
            return rng.choice(same_unit)
        digits = re.search(r"\d+", true)
        assert digits is not None
        if rng.random() < 0.25:
            # A figure that the body does tell, of something else.
            other = re.search(r"\d+", rng.choice([figure for figure in told if figure != true]))
            assert other is not None
            return true.replace(digits[0], other[0])
        place = rng.randrange(len(digits[0]))
        digit = rng.choice([d for d in "123456789" if d != digits[0][place]])
        return true.replace(digits[0], digits[0][:place] + digit + digits[0][place + 1 :])
    if slot == "te":
        return rng.choice([language for language in words.LANGUAGES if language != true])
    if slot == "why":
        return rng.choice([reason for reason in words.REASONS[tale.kind] if reason != true])
    if slot == "da":
        month, day = true.split()
        if rng.random() < 0.5:
            return f"{rng.choice([m for m in words.MONTHS if m != month])} {day}"
        return f"{month} {rng.choice([d for d in range(1, 29) if d != int(day)])}"
    kind_of_name = "co" if slot == "rv" else slot
    told = [name for name in tale.others[kind_of_name] if name != true]
    if slot in ("co", "rv"):
        swap = tale.slots["rv" if slot == "co" else "co"]
        told += [swap] if swap in tale.body else []
    if told and may_be_told and rng.random() < 0.5:
        return rng.choice(told)
    if kind_of_name == "ci":
        absent = rng.choice(words.CITIES)
    elif rng.random() < 0.5:
        absent = _misspelt(rng, kind_of_name, true)
    else:
        absent = {"co": company, "pr": product, "pe": person}[kind_of_name](rng)
    return None if absent in tale.body else absent


def _misspelt(rng: random.Random, kind_of_name: str, name: str) -> str:
    """Return a name that shares one half with `name`."""
    if kind_of_name == "pe":
        first, last = name.split()
        if rng.random() < 0.5:
            return f"{first} {rng.choice(words.LAST_NAMES)}"
        return f"{rng.choice(words.FIRST_NAMES)} {last}"
    starts, ends = (
        (words.COMPANY_STARTS, words.COMPANY_ENDS)
        if kind_of_name == "co"
        else (words.PRODUCT_STARTS, words.PRODUCT_ENDS)
    )
    start = next(s for s in starts if name.startswith(s) and name[len(s) :] in ends)
    if rng.random() < 0.5:
        return start + rng.choice(ends)
    return rng.choice(starts) + name[len(start) :]


def _flipped(rng: random.Random, tale: Tale, style: str, title: str) -> str | None:
    """Claim the opposite direction."""
    pairs = [pair for pair in texts.KINDS[tale.kind].flips if re.search(rf"\b{pair[0]}\b", title)]
    if not pairs:
        return None
    word, opposite = rng.choice(pairs)
    return re.sub(rf"\b{word}\b", opposite, title, count=1)


def _with_invention(rng: random.Random, tale: Tale, style: str, title: str) -> str | None:
    """Append an outcome that the body does not tell."""
    names = {
        "x": company(rng),
        "y": person(rng),
        "z": rng.choice([city for city in words.CITIES if city not in tale.body]),
    }
    if title.endswith("?") or names["x"] in tale.body or names["y"] in tale.body:
        return None
    return title + rng.choice(texts.INVENTED).format(**names)
