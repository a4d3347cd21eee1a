"""Profiles and settings: what is read, and what a mistake is answered with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tasks.titles.config import PROFILES_DIR, export_hub_endpoint, load_profile, profile_names
from tasks.titles.errors import ConfigError


@pytest.mark.parametrize("path", sorted(PROFILES_DIR.glob("*.toml")), ids=lambda path: path.stem)
def test_every_profile_parses(path: Path) -> None:
    assert load_profile(path.stem).name == path.stem
    assert load_profile(str(path)) == load_profile(path.stem)


def test_the_profiles_of_the_design_are_there() -> None:
    assert {"starter", "qwen-0.5b", "qwen-7b"} <= set(profile_names())


def test_the_published_settings() -> None:
    for name in ("qwen-0.5b", "qwen-7b"):
        profile = load_profile(name)
        assert profile.stories == "OpenPipe/hacker-news-scraped-stories-filtered"
        assert (profile.minimum_score, profile.train_stories, profile.val_stories) == (20, 5000, 100)
        assert (profile.max_prompt_tokens, profile.max_completion_tokens) == (8092, 100)
        assert (profile.group_size, profile.groups_per_step, profile.eval_steps) == (6, 1, 50)
        assert (profile.learning_rate.art, profile.learning_rate.trl) == (1.2e-5, 5e-6)
        assert (profile.lora_rank, profile.lora_alpha) == (8, 8)
        assert (profile.max_grad_norm, profile.kl_beta, profile.temperature) == (0.1, 0.0, 1.0)


def test_overrides_are_read_as_json_or_as_text() -> None:
    profile = load_profile(
        "starter",
        [
            "max_steps=5",
            "learning_rate.art=1e-4",
            "stories=../data/a=b.parquet",
            "heldout_reward_model=null",
            "prefect_rollouts=false",
            'name="mine"',
        ],
    )
    assert profile.max_steps == 5
    assert profile.learning_rate.art == 1e-4
    assert profile.learning_rate.trl == load_profile("starter").learning_rate.trl
    assert profile.stories == "../data/a=b.parquet"
    assert profile.heldout_reward_model is None
    assert profile.prefect_rollouts is False
    assert profile.name == "mine"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("max_setps=5", ["max_setps: no such setting", "max_steps"]),
        ("learning_rate.adam=1", ["learning_rate.adam: no such setting"]),
        ("max_steps=zero", ["max_steps", "'zero'"]),
        ("max_steps=0", ["max_steps", "greater than or equal to 1", "0"]),
        ("group_size=1", ["group_size", "1"]),
        ("learning_rate.art=-1", ["learning_rate.art", "-1"]),
        ("learning_rate.trl=NaN", ["learning_rate.trl"]),
        ("engine=ppo", ["engine", "'art'", "'ppo'"]),
        ("device=tpu", ["device", "'tpu'"]),
        ("max_steps", ["key=value", "'max_steps'"]),
        ("=5", ["key=value", "'=5'"]),
        ("max_steps.x=1", ["max_steps.x=1", "'max_steps' is not a table"]),
        ("learning_rate=1e-3", ["learning_rate", "0.001"]),
    ],
)
def test_a_wrong_override_is_answered_with_its_key(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_profile("starter", [override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("override", ["temperature=0.7", "top_p=0.95", "top_k=50", "min_p=0.1"])
def test_biased_sampling_is_refused(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_profile("starter", [override])
    assert override.split("=")[0] in str(caught.value)
    assert "importance ratio" in str(caught.value)


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_profile("starter", ["max_steps=0", "unknown=1", "seed=x"])
    for key in ("max_steps", "unknown", "seed"):
        assert f"  {key}: " in str(caught.value)


def test_an_unknown_profile_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"No profile 'startr'.*starter"):
        load_profile("startr")


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("seed = 3\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_profile(str(path))
    assert "mine.toml" in str(caught.value)
    assert "max_steps: Field required" in str(caught.value)


@pytest.mark.parametrize("content", [b"seed = = 3", b"seed = '\xff'"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.toml is not valid TOML"):
        load_profile(str(path))


def test_the_hub_endpoint_of_a_dotenv_file_reaches_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "")  # so that its old value comes back after the test
    monkeypatch.delenv("HF_ENDPOINT")
    monkeypatch.chdir(tmp_path)
    export_hub_endpoint()
    assert "HF_ENDPOINT" not in os.environ
    (tmp_path / ".env").write_text("HF_ENDPOINT=https://mirror.example\n", encoding="utf-8")
    export_hub_endpoint()
    assert os.environ["HF_ENDPOINT"] == "https://mirror.example"
    monkeypatch.setenv("HF_ENDPOINT", "https://other.example")
    export_hub_endpoint()
    assert os.environ["HF_ENDPOINT"] == "https://other.example"


@pytest.mark.parametrize(
    ("profile", "overrides", "devices"),
    [
        ("starter", ["devices=2", "engine=trl"], 1),
        ("qwen-0.5b", [], 1),
        ("qwen-0.5b", ["art.trainer_gpus=[0]", "art.inference_gpus=[1]"], 2),
        ("qwen-0.5b", ["engine=trl", "devices=3"], 3),
        ("qwen-0.5b", ["engine=trl", "devices=2", "trl.server_gpus=[2]"], 3),
    ],
)
def test_all_gpus_that_a_run_holds_are_counted(profile: str, overrides: list[str], devices: int) -> None:
    assert load_profile(profile, overrides).devices_in_use == devices


def test_a_gpu_has_no_negative_number() -> None:
    with pytest.raises(ConfigError, match=r"trl\.server_gpus"):
        load_profile("qwen-0.5b", ["trl.server_gpus=[-1]"])
