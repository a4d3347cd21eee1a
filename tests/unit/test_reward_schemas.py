"""What a score request may hold."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from reward_server.schemas import MAX_BODY, MAX_TITLE, ScoreRequest, read_time

NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "moment"),
    [
        (None, None),
        (0, datetime(1970, 1, 1, tzinfo=UTC)),
        (1714564800, NOON),
        (1714564800.5, NOON.replace(microsecond=500_000)),
        (-1, datetime(1969, 12, 31, 23, 59, 59, tzinfo=UTC)),
        ("2024-05-01T12:00:00Z", NOON),
        ("2024-05-01T14:00:00+02:00", NOON),
        ("2024-05-01T12:00:00", NOON),
        ("2024-05-01", NOON.replace(hour=0)),
        (NOON, NOON),
        (30_000_000_000, datetime(2920, 8, 30, 5, 20, tzinfo=UTC)),  # seconds, also where others read milliseconds
    ],
)
def test_time_is_read_as_utc(value: object, moment: datetime | None) -> None:
    assert read_time(value) == moment


@pytest.mark.parametrize(
    "value",
    [
        "",
        "yesterday",
        "1714564800",
        "2024-13-01",
        "2024-05-01T25:00:00Z",
        "0001-01-01T00:00:00+05:00",
        1e300,
        float("nan"),
        float("inf"),
        10**400,
        True,
        [],
        {},
    ],
)
def test_what_is_no_time_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"expected|must|lie|out of range|month|hour|time"):
        read_time(value)


@given(st.datetimes(timezones=st.just(UTC)))
def test_an_iso_string_keeps_its_moment(moment: datetime) -> None:
    assert read_time(moment.isoformat()) == moment


@pytest.mark.parametrize(
    "change",
    [
        {"title": ""},
        {"title": " \n\t"},
        {"title": "x" * (MAX_TITLE + 1)},
        {"title": None},
        {"scraped_body": "x" * (MAX_BODY + 1)},
        {"scraped_body": None},
        {"scrapped_body": "a slip of the pen"},
        {"by": 7},
    ],
)
def test_bad_requests_are_refused(change: dict[str, object]) -> None:
    good: dict[str, object] = {"title": "A title", "scraped_body": "A body."}
    assert ScoreRequest.model_validate(good).by is None
    with pytest.raises(ValidationError):
        ScoreRequest.model_validate(good | change)
