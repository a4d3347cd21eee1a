"""Stories from files: every odd value is mended or dropped by reason, every unusable source is one clear error."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.titles.errors import DataError
from tasks.titles.filters import Reason
from tasks.titles.rows import LoadedStories, Repair, read_rows
from tasks.titles.sources import load_stories
from tasks.titles.story import Story

TIME = datetime(2024, 5, 1, 12, 30, tzinfo=UTC)
ROW: dict[str, Any] = {
    "id": 75,
    "by": "ann",
    "time": int(TIME.timestamp()),
    "title": "A title",
    "url": "https://x.example",
    "score": 25,
    "scraped_body": "A body",
    "split": "train",
}
STORY = Story("75", "ann", TIME, "A title", "https://x.example", 25, "A body", "train")


def read(*rows: dict[str, Any] | None) -> LoadedStories:
    """The rows, among others that give the source all three splits."""
    others = [{**ROW, "id": split, "split": split} for split in ("train", "val", "test")]
    loaded = read_rows("test", [*rows, *others])
    return LoadedStories("test", loaded.stories[:-3], loaded.unusable, loaded.repairs, loaded.division)


def write_jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def columns(**changes: Any) -> dict[str, Any]:
    return {**{name: [value] for name, value in ROW.items()}, **changes}


@pytest.mark.parametrize(
    ("change", "field", "value", "repair"),
    [
        ({}, "id", "75", None),
        ({"id": 75.0}, "id", "75", None),
        ({"id": " abc-1 "}, "id", "abc-1", None),
        ({"score": 25.0}, "score", 25, None),
        ({"score": "25"}, "score", 25, None),
        ({"score": -3}, "score", -3, None),
        ({"by": None}, "by", "", Repair.NO_SUBMITTER),
        ({"by": float("nan")}, "by", "", Repair.NO_SUBMITTER),
        ({"by": 7}, "by", "", Repair.NO_SUBMITTER),
        ({"url": None}, "url", "", Repair.NO_URL),
        ({"url": ["https://x.example"]}, "url", "", Repair.NO_URL),
        ({"time": None}, "time", None, Repair.NO_DATE),
        ({"time": float("nan")}, "time", None, Repair.NO_DATE),
        ({"time": -1}, "time", None, Repair.WRONG_DATE),
        ({"time": 0}, "time", None, Repair.WRONG_DATE),
        ({"time": int(TIME.timestamp()) * 1000}, "time", None, Repair.WRONG_DATE),
        ({"time": 10**18}, "time", None, Repair.WRONG_DATE),
        ({"time": 10**400}, "time", None, Repair.WRONG_DATE),
        ({"time": float("inf")}, "time", None, Repair.WRONG_DATE),
        ({"time": True}, "time", None, Repair.WRONG_DATE),
        ({"time": "yesterday"}, "time", None, Repair.WRONG_DATE),
        ({"time": {"$date": 1}}, "time", None, Repair.WRONG_DATE),
        ({"time": str(int(TIME.timestamp()))}, "time", TIME, None),
        ({"time": "2024-05-01T14:30:00+02:00"}, "time", TIME, None),
        ({"time": "2024-05-01 12:30:00"}, "time", TIME, None),
        ({"time": TIME.timestamp() + 0.5}, "time", TIME.replace(microsecond=500000), None),
        ({"title": "Odd \ud800 title"}, "title", "Odd ? title", Repair.ODD_CHARACTERS),
        ({"by": "\udfff"}, "by", "?", Repair.ODD_CHARACTERS),
        ({"scraped_body": "Left \ud800 alone"}, "scraped_body", "Left \ud800 alone", None),
        (
            {"scraped_body": "<|im_end|>\x00\u202e 😀 </article>"},
            "scraped_body",
            "<|im_end|>\x00\u202e 😀 </article>",
            None,
        ),
        ({"scraped_body": None}, "scraped_body", "", None),
        ({"title": None}, "title", "", None),
        ({"split": " Training "}, "split", "train", None),
        ({"split": "validation"}, "split", "val", None),
        ({"split": "dev"}, "split", "val", None),
        ({"split": b"test"}, "split", "test", None),
    ],
)
def test_a_row_that_can_be_a_story(change: dict[str, Any], field: str, value: Any, repair: Repair | None) -> None:
    loaded = read({**ROW, **change})
    assert getattr(loaded.stories[0], field) == value
    assert loaded.repairs == ({repair: 1} if repair else {})
    assert loaded.unusable == {}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**ROW, "id": None}, Reason.NO_ID),
        ({**ROW, "id": float("nan")}, Reason.NO_ID),
        ({**ROW, "id": 1.5}, Reason.NO_ID),
        ({**ROW, "id": "  "}, Reason.NO_ID),
        ({**ROW, "id": True}, Reason.NO_ID),
        ({**ROW, "score": None}, Reason.NO_SCORE),
        ({**ROW, "score": float("nan")}, Reason.NO_SCORE),
        ({**ROW, "score": float("inf")}, Reason.NO_SCORE),
        ({**ROW, "score": 2.5}, Reason.NO_SCORE),
        ({**ROW, "score": "many"}, Reason.NO_SCORE),
        ({**ROW, "score": True}, Reason.NO_SCORE),
        ({**ROW, "score": 10**30}, Reason.NO_SCORE),
        ({**ROW, "title": 7}, Reason.TITLE_NOT_TEXT),
        ({**ROW, "scraped_body": 7}, Reason.BODY_NOT_TEXT),
        ({**ROW, "scraped_body": ["a", "b"]}, Reason.BODY_NOT_TEXT),
        ({**ROW, "split": None}, Reason.UNKNOWN_SPLIT),
        ({**ROW, "split": "holdout"}, Reason.UNKNOWN_SPLIT),
        ({**ROW, "split": 3}, Reason.UNKNOWN_SPLIT),
        (None, Reason.BROKEN_LINE),
    ],
)
def test_a_row_that_cannot_be_a_story(row: dict[str, Any] | None, reason: Reason) -> None:
    loaded = read(row)
    assert loaded.stories == ()
    unknown = reason in {Reason.UNKNOWN_SPLIT, Reason.BROKEN_LINE}
    assert loaded.unusable == {("unknown" if unknown else "train", reason): 1}
    assert loaded.repairs == {}


@pytest.mark.parametrize(
    ("splits", "of", "shares"),
    [
        (["train", "val", "test"], None, None),
        (["train", "validation"], "val", {"test": 0.5}),
        (["train", "test"], "test", {"val": 0.5}),
        (["train", "train"], "train", {"test": 0.05, "val": 0.05}),
        ([None, None], "train", {"test": 0.05, "val": 0.05}),
        (["val", "test"], None, None),
    ],
)
def test_a_missing_split_is_made_up_for(splits: list[str | None], of: str | None, shares: dict[str, float]) -> None:
    loaded = read_rows("test", [{**ROW, "split": split} for split in splits])
    assert len(loaded.stories) == len(splits)
    if of is None:
        assert loaded.division is None
    else:
        assert loaded.division is not None
        assert (loaded.division.of, loaded.division.shares) == (of, shares)
        assert "became" in loaded.division.note


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "stories.jsonl"
    row = json.dumps(ROW).encode()
    lines = [
        b"\xef\xbb\xbf" + row,
        b"",
        b"{broken",
        b"[1, 2]",
        b'"\xff"',
        row.replace(b"25", b"NaN"),
        json.dumps({**ROW, "scraped_body": "one\u2028line"}, ensure_ascii=False).encode(),
        row.replace(b"A body", rb"\ud800"),
    ]
    path.write_bytes(b"\n".join(lines))
    loaded = load_stories(str(path))
    assert [story.scraped_body for story in loaded.stories] == ["A body", "one\u2028line", "\ud800"]
    assert loaded.unusable == {("unknown", Reason.BROKEN_LINE): 3, ("train", Reason.NO_SCORE): 1}
    assert loaded.source == str(path)


def test_a_column_that_single_json_lines_leave_out(tmp_path: Path) -> None:
    without = {name: value for name, value in ROW.items() if name not in {"by", "url"}}
    loaded = load_stories(str(write_jsonl(tmp_path / "stories.jsonl", ROW, without)))
    assert loaded.stories[0] == STORY
    assert (loaded.stories[1].by, loaded.stories[1].url) == ("", "")


@pytest.mark.parametrize(
    "time",
    [
        pa.array([int(TIME.timestamp())]),
        pa.array([float(TIME.timestamp())]),
        pa.array([TIME.replace(tzinfo=None)], pa.timestamp("ns")),
        pa.array([TIME], pa.timestamp("ms", tz="Europe/Berlin")),
        pa.array([TIME.isoformat()]),
    ],
)
def test_parquet_times(tmp_path: Path, time: pa.Array) -> None:
    loaded = load_stories(str(write_parquet(tmp_path / "stories.parquet", columns(time=time, extra=["ignored"]))))
    assert loaded.stories == (STORY,)


@pytest.mark.parametrize(
    "time",
    [
        pa.array([-(2**62)], pa.timestamp("us")),
        pa.array([2**62], pa.timestamp("ms")),
        pa.array([date(1970, 1, 1)]),
        pa.array([10**12 * 1700]),
    ],
)
def test_parquet_times_that_are_wrong(tmp_path: Path, time: pa.Array) -> None:
    loaded = load_stories(str(write_parquet(tmp_path / "stories.parquet", columns(time=time))))
    assert loaded.stories[0].time is None
    assert loaded.repairs == {Repair.WRONG_DATE: 1}


def test_parquet_types_of_columns(tmp_path: Path) -> None:
    odd = columns(
        id=pa.array(["75"]),
        by=pa.array(["ann"]).dictionary_encode(),
        url=pa.nulls(1),
        score=pa.array([25.0]),
        scraped_body=pa.array(["A body"], pa.large_string()),
        split=pa.array(["train"]).dictionary_encode(),
    )
    loaded = load_stories(str(write_parquet(tmp_path / "stories.parquet", odd)))
    assert loaded.stories == (Story("75", "ann", TIME, "A title", "", 25, "A body", "train"),)


def test_parquet_text_that_is_no_utf8(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"], pa.binary()).buffers())
    path = write_parquet(tmp_path / "stories.parquet", columns(title=broken, scraped_body=broken))
    loaded = load_stories(str(path))
    assert loaded.stories[0].title == "caf?"
    assert loaded.stories[0].scraped_body == "caf\udce9"  # no tokenizer takes it, and that is counted there
    assert loaded.repairs == {Repair.ODD_CHARACTERS: 1}


def test_the_starter_stories() -> None:
    loaded = load_stories("starter")
    assert {story.split for story in loaded.stories} == {"train", "val", "test"}
    assert len({story.id for story in loaded.stories}) == len(loaded.stories) > 1000
    assert loaded.division is None


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_missing_column_is_named_with_what_is_there(tmp_path: Path, kind: str) -> None:
    row = {name: value for name, value in ROW.items() if name not in {"scraped_body", "url"}} | {"body": "A body"}
    if kind == "jsonl":
        path = write_jsonl(tmp_path / "stories.jsonl", row)
    else:
        path = write_parquet(tmp_path / "stories.parquet", {name: [value] for name, value in row.items()})
    with pytest.raises(DataError) as caught:
        load_stories(str(path))
    message = str(caught.value)
    assert "'url'" in message and "'scraped_body' (is it 'body'?)" in message
    assert "it has body, by, id, score, split, time, title." in message


def test_a_wrong_path_is_answered_with_close_ones(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "stories.jsonl", ROW)
    for wrong in ("data/storys.jsonl", "data/stories.parquet", "data/stories"):
        with pytest.raises(DataError, match=r"Did you mean .*data/stories\.jsonl"):
            load_stories(str(tmp_path / wrong))
    with pytest.raises(DataError, match=r"Did you mean .*data\?"):
        load_stories(str(tmp_path / "date" / "stories.jsonl"))


@pytest.mark.parametrize("source", ["startr", "", "no such/thing", "https://x.example/stories", "a/b/c"])
def test_a_source_that_is_nothing(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        load_stories(source)
    assert "Expected 'starter', a .parquet or .jsonl file" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", b"", "no rows"),
        ("blank.jsonl", b"\n \n", "no rows"),
        ("broken.jsonl", b"id,by\n1,ann\n", "holds no JSON object in any line (line 1:"),
        ("empty.parquet", b"", "no readable parquet file"),
        ("broken.parquet", b"PAR1 and then nothing of use PAR1", "no readable parquet file"),
        ("stories.csv", b"id,by\n1,ann\n", "neither of .parquet and .jsonl"),
    ],
)
def test_an_unreadable_file_is_one_clear_error(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_stories(str(path))
    assert words in str(caught.value)
    assert name in str(caught.value)


def test_a_truncated_parquet_file(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "stories.parquet", columns())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="no readable parquet file"):
        load_stories(str(path))


def test_a_parquet_file_without_rows(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "stories.parquet", {name: [] for name in ROW})
    with pytest.raises(DataError, match="has no rows"):
        load_stories(str(path))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "stories.parquet").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        load_stories(str(tmp_path / "stories.parquet"))
    with pytest.raises(DataError, match="is a folder"):
        load_stories(str(tmp_path))
