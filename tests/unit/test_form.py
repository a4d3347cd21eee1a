"""What a form's fields make of a profile."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import pytest

from flows.form import filled_in, training_fields
from flows.nightly import nightly_name
from tasks.titles.config import load_profile


@pytest.mark.parametrize(
    ("overrides", "fields", "expected"),
    [
        (None, {}, []),
        (["max_steps=5"], {"max_steps": None}, ["max_steps=5"]),
        (["max_steps=5"], {"max_steps": 7}, ["max_steps=5", "max_steps=7"]),
        (None, {"stories": "5"}, ['stories="5"']),
        (None, {"reward_training.train_until": date(2024, 12, 31)}, ['reward_training.train_until="2024-12-31"']),
    ],
)
def test_fields_come_after_overrides_and_empty_ones_not_at_all(
    overrides: list[str] | None, fields: dict[str, Any], expected: list[str]
) -> None:
    assert filled_in(overrides, fields) == expected


def test_fields_become_the_profiles_settings() -> None:
    fields = training_fields(engine="trl", stories="null", max_steps=7, learning_rate=1e-4, group_size=4, seed=3)
    profile = load_profile("starter", filled_in(["max_steps=5", "val_stories=9"], fields))
    assert (profile.engine, profile.stories, profile.max_steps, profile.val_stories) == ("trl", "null", 7, 9)
    assert (profile.learning_rate.art, profile.learning_rate.trl) == (1e-4, 1e-4)
    assert (profile.group_size, profile.seed) == (4, 3)


def test_empty_fields_leave_the_profile_as_it_is() -> None:
    fields = training_fields(engine=None, stories=None, max_steps=None, learning_rate=None, group_size=None, seed=None)
    assert load_profile("starter", filled_in(None, fields)) == load_profile("starter")


def test_a_nights_run_is_named_after_the_day_it_is_scheduled_for() -> None:
    night = datetime(2026, 3, 1, 2, 0, tzinfo=UTC)
    elsewhere = night.astimezone(timezone(timedelta(hours=-8)))
    names = {nightly_name(load_profile("starter"), moment) for moment in (night, elsewhere, night + timedelta(hours=9))}
    assert names == {"nightly-starter-art-2026-03-01"}
    assert nightly_name(load_profile("starter", ["engine=trl"]), night + timedelta(days=1)) == (
        "nightly-starter-trl-2026-03-02"
    )
