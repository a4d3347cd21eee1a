"""From a profile to its prompts: load, filter, count tokens, choose; cached by content."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tasks.starter.paths import BASE_MODEL, resolve
from tasks.titles.config import Profile
from tasks.titles.errors import DataError
from tasks.titles.filter_report import FilterReport, account
from tasks.titles.filters import choose, divide, filter_content, filter_duplicates, filter_length
from tasks.titles.prompt_file import read_prompts, write_prompts
from tasks.titles.prompts import policy_messages
from tasks.titles.rows import LoadedStories
from tasks.titles.sources import load_stories
from tasks.titles.story import SPLITS, Prompt, Split
from tasks.titles.tokens import Progress, count_prompt_tokens, load_tokenizer, tokenizer_fingerprint

logger = logging.getLogger(__name__)

# Raise it with any change to the filters, the report or the cached file.
CACHE_VERSION = 2


@dataclass(frozen=True)
class PreparedPrompts:
    """The prompts of each split, ordered by a hash of the story's id, and the account of all the others."""

    train: tuple[Prompt, ...]
    val: tuple[Prompt, ...]
    test: tuple[Prompt, ...]
    report: FilterReport


def prepare_prompts(
    profile: Profile, *, cache_dir: Path, progress: Progress | None = None, keep: bool = True
) -> PreparedPrompts:
    """Return the prompts that `profile` asks for, and the report of what became of every row.

    The source is read on every call; filtering and tokenising it are cached in `cache_dir`, by a hash
    of the stories, the tokenizer, the profile's limits and the prompt. `progress` follows the tokenising. Without
    `keep` the cache is read, but nothing is written.

    Raises `DataError` where the stories cannot be read or a split has none left, and `ConfigError` where
    the base model has no usable tokenizer.
    """
    loaded = load_stories(profile.stories)
    tokenizer = load_tokenizer(resolve(profile.base_model, BASE_MODEL))
    key = _cache_key(profile, loaded, tokenizer_fingerprint(tokenizer))
    path = cache_dir / f"prompts-{key[:24]}.parquet"
    cached = _read(path)
    if cached is not None:
        logger.info("Prompts come from %s", path)
        return cached

    stories, unfit = filter_content(loaded.stories, profile.minimum_score)
    stories, duplicates = filter_duplicates(stories)
    lengths = count_prompt_tokens(tokenizer, [story.scraped_body for story in stories], progress)
    prompts, unreadable = filter_length(stories, lengths, profile.max_prompt_tokens)
    prompts, moved = divide(prompts, loaded.division) if loaded.division else (prompts, {})
    chosen, beyond = choose(prompts, _limits(profile))
    report = account(loaded, unfit + duplicates + unreadable, moved, chosen, beyond, lengths)
    for split in SPLITS:
        if not report.kept.get(split):
            raise _nothing_left(split, report)
    if keep:
        write_prompts(path, chosen, report.model_dump_json())
    return _by_split(chosen, report)


def _limits(profile: Profile) -> dict[Split, int]:
    return {"train": profile.train_stories, "val": profile.val_stories, "test": profile.test_stories}


def _nothing_left(split: Split, report: FilterReport) -> DataError:
    rows = ", ".join(f"{name} {count}" for name, count in report.came.items())
    reasons = ", ".join(f"{reason} {sum(part.values())}" for reason, part in report.dropped.items())
    return DataError(
        f"{report.source} leaves no {split} prompts. Rows by split: {rows}. Dropped: {reasons or 'none'}. "
        "Training, validation and test need at least one prompt each: lower minimum_score, raise max_prompt_tokens, "
        f"or give a source with more {split} stories."
    )


def _cache_key(profile: Profile, loaded: LoadedStories, tokenizer: str) -> str:
    digest = hashlib.sha256()
    counts = sorted((split, str(reason), count) for (split, reason), count in loaded.unusable.items())
    head = {
        "version": CACHE_VERSION,
        "source": loaded.source,
        "unusable": counts,
        "repairs": dict(loaded.repairs),
        "division": loaded.division.note if loaded.division else None,
        "tokenizer": tokenizer,
        "prompt": policy_messages("{body}"),
        "minimum_score": profile.minimum_score,
        "max_prompt_tokens": profile.max_prompt_tokens,
        "limits": _limits(profile),
    }
    digest.update(json.dumps(head, sort_keys=True).encode())
    for story in loaded.stories:
        digest.update(repr(story).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _read(path: Path) -> PreparedPrompts | None:
    """Return what is cached, or None where there is nothing or nothing that is whole."""
    if not path.is_file():
        return None
    try:
        prompts, report = read_prompts(path)
        return _by_split(prompts, FilterReport.model_validate_json(report))
    except (DataError, ValueError) as error:
        logger.warning("%s is damaged (%s); the prompts are made again", path, error)
        return None


def _by_split(prompts: Iterable[Prompt], report: FilterReport) -> PreparedPrompts:
    train, val, test = (tuple(prompt for prompt in prompts if prompt.story.split == split) for split in SPLITS)
    return PreparedPrompts(train, val, test, report)
