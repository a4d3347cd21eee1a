"""An account of what became of every row of a source, for the terminal, Markdown and JSON."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from tasks.titles.filters import Dropped, Reason
from tasks.titles.rows import LoadedStories, SplitOrUnknown
from tasks.titles.story import SPLITS, Prompt, Split

QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
EXAMPLES = 3
EXAMPLE_CHARACTERS = 1000

PerSplit = dict[SplitOrUnknown, int]
COLUMNS: tuple[SplitOrUnknown, ...] = (*SPLITS, "unknown")


class Example(BaseModel):
    """A prompt as the policy reads it, next to the title that a human gave."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    score: int
    title: str
    tokens: int
    prompt: str
    """The user message, cut after `EXAMPLE_CHARACTERS` with a word about the rest."""


class FilterReport(BaseModel):
    """Rows in and out by split and reason. A report whose rows do not add up is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    came: PerSplit
    """Rows in the source; 'unknown' where a row names no split that can be read."""
    dropped: dict[Reason, PerSplit]
    moved: PerSplit
    """Good prompts that changed their split because the source lacks one; adds up to 0."""
    beyond_limit: PerSplit
    """Good prompts that the profile's limits leave out."""
    kept: PerSplit
    repairs: dict[str, int]
    notes: list[str]
    tokens: dict[str, dict[str, int]]
    """Quantiles of prompt lengths in tokens, before the length filter and of what is kept."""
    examples: list[Example]

    @model_validator(mode="after")
    def _every_row_is_accounted_for(self) -> FilterReport:
        for split in COLUMNS:
            came = self.came.get(split, 0) + self.moved.get(split, 0)
            out = sum(part.get(split, 0) for part in (self.kept, self.beyond_limit, *self.dropped.values()))
            if out != came:
                raise ValueError(f"{split}: of {came} rows, {out} are accounted for")
        return self

    @property
    def total_came(self) -> int:
        """Rows in the source, over all splits."""
        return sum(self.came.values())

    @property
    def total_dropped(self) -> int:
        """Rows dropped for any reason, over all splits."""
        return sum(sum(part.values()) for part in self.dropped.values())

    def rows(self) -> list[dict[str, str | int]]:
        """Return the table of counts: one row per step from the source to the prompts, one column per split."""
        columns = COLUMNS if self.came.get("unknown") else COLUMNS[:-1]
        named = [("rows in the source", self.came)]
        named += [(f"dropped: {reason}", part) for reason, part in self.dropped.items()]
        named += [("moved to another split", self.moved)] if self.moved else []
        named += [("beyond the limit", self.beyond_limit), ("prompts", self.kept)]
        return [
            {"stories": name, **{column: part.get(column, 0) for column in columns}, "all": sum(part.values())}
            for name, part in named
        ]

    def as_line(self) -> str:
        """Return what came, what was kept and what was dropped for which reason, in one line."""
        kept = ", ".join(f"{self.kept.get(split, 0):,} {split}" for split in SPLITS)
        reasons = [f"{sum(part.values()):,} {reason}" for reason, part in self.dropped.items()]
        reasons += [f"{sum(self.beyond_limit.values()):,} beyond the limit"] if self.beyond_limit else []
        return f"{self.total_came:,} rows gave {sum(self.kept.values()):,} prompts ({kept}); left out: " + (
            ", ".join(reasons) or "none"
        )

    def token_rows(self) -> list[dict[str, str | int]]:
        """Return the table of prompt lengths: one row per set of stories, one column per quantile."""
        return [{"tokens per prompt": name, **quantiles} for name, quantiles in self.tokens.items()]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return self.model_dump(mode="json")

    def as_markdown(self) -> str:
        """Return the report as Markdown: both tables, what was mended, how the splits came about, examples."""
        parts = [f"## Stories from {self.source}", _table(self.rows())]
        if self.notes:
            parts.append("\n".join(f"* {note}" for note in self.notes))
        if self.repairs:
            parts.append("Mended in stories that stayed:")
            parts.append("\n".join(f"* {repair}: {count}" for repair, count in self.repairs.items()))
        parts.append(_table(self.token_rows()))
        for example in self.examples:
            parts.append(f"Story {example.id}, {example.score} points, {example.tokens} tokens")
            parts.append(_fenced(f"{example.prompt}\n\nThe human title: {example.title}"))
        return "\n\n".join(parts) + "\n"


def account(
    loaded: LoadedStories,
    dropped: Dropped,
    moved: Mapping[Split, int],
    chosen: Sequence[Prompt],
    beyond: Sequence[Prompt],
    lengths: Iterable[int | None],
) -> FilterReport:
    """Count everything that happened between a source and its prompts."""
    came: Counter[SplitOrUnknown] = Counter(story.split for story in loaded.stories)
    by_reason: dict[Reason, Counter[SplitOrUnknown]] = {reason: Counter() for reason in Reason}
    for (split, reason), count in loaded.unusable.items():
        came[split] += count
        by_reason[reason][split] += count
    for story, reason in dropped:
        by_reason[reason][story.split] += 1
    tokens = {"before the length filter": [length for length in lengths if length is not None]}
    tokens |= {split: [prompt.tokens for prompt in chosen if prompt.story.split == split] for split in SPLITS}
    return FilterReport(
        source=loaded.source,
        came=dict(came),
        dropped={reason: dict(counts) for reason, counts in by_reason.items() if counts},
        moved={split: count for split, count in moved.items()},
        beyond_limit=dict(Counter(prompt.story.split for prompt in beyond)),
        kept=dict(Counter(prompt.story.split for prompt in chosen)),
        repairs={str(repair): count for repair, count in sorted(loaded.repairs.items())},
        notes=[loaded.division.note] if loaded.division else [],
        tokens={name: quantiles(values) for name, values in tokens.items() if values},
        examples=[_example(prompt) for prompt in chosen[:EXAMPLES]],
    )


def quantiles(values: Sequence[int]) -> dict[str, int]:
    """Return the `QUANTILES` of `values`, each one of the values themselves (nearest rank)."""
    ordered = sorted(values)
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in QUANTILES.items()}


def _example(prompt: Prompt) -> Example:
    text = prompt.messages[-1]["content"]
    rest = len(text) - EXAMPLE_CHARACTERS
    if rest > 0:
        text = f"{text[:EXAMPLE_CHARACTERS]}… ({rest} characters more)"
    story = prompt.story
    return Example(id=story.id, score=story.score, title=story.title, tokens=prompt.tokens, prompt=text)


def _table(rows: Sequence[Mapping[str, str | int]]) -> str:
    header = list(rows[0]) if rows else []
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *[[f"{row[name]}" for name in header] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fenced(text: str) -> str:
    # An article may hold fences of its own; a longer one keeps it inside.
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"
