"""A merged reward model scores as the model that it was made of, and holds what vLLM looks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from serving import starter_scorer

from reward_server.check import sample_inputs
from reward_server.merge import main
from reward_server.model_files import find_model
from reward_server.schemas import ScoreRequest
from reward_server.scorer import Scorer

REQUESTS = [
    ScoreRequest(title=item.title, by=item.by, time=item.time, scraped_body=item.scraped_body, url=item.url)
    for item in sample_inputs()
]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.01)])
def test_the_scores_are_those_of_the_unmerged_model(tmp_path: Path, dtype: str, tolerance: float) -> None:
    folder = tmp_path / "some" / "merged"
    assert main(["--model", "starter", "--to", str(folder), "--dtype", dtype]) == 0
    files = find_model(str(folder))
    assert files.adapter is None
    scorer = Scorer(files, device="cpu", dtype=torch.float32, max_length=4096)
    assert scorer.encode(REQUESTS) == starter_scorer().encode(REQUESTS)
    assert scorer.score_texts(REQUESTS) == pytest.approx(starter_scorer().score_texts(REQUESTS), abs=tolerance)

    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
    assert config["id2label"].keys() == {"0"}
    assert (config["problem_type"], config["dtype"], config["pad_token_id"]) == ("regression", dtype, 2045)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert weights.get_slice("score.weight").get_shape() == [1, config["hidden_size"]]
        assert weights.get_tensor("model.embed_tokens.weight").dtype == getattr(torch, dtype)
    # vLLM maps all other names by itself, and a head of the language model would be one weight too many for it.
    assert all(name.startswith("model.") for name in names - {"score.weight"})
    assert [path.name for path in folder.parent.iterdir()] == ["merged"]


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kept").write_text("mine")
    assert main(["--to", str(tmp_path)]) == 2
    assert "is there already. Give a new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_what_cannot_be_loaded_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path / "none"), "--to", str(tmp_path / "merged")]) == 2
    assert "No folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "rename", full)  # the last step: all files have been written
    assert main(["--to", str(tmp_path / "merged")]) == 2
    assert "cannot be written: No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
