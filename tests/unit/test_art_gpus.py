"""Which GPUs ART's trainer and vLLM get: one that both share, or one for each."""

from __future__ import annotations

import pytest

from tasks.engines.art_session import check_art_settings, gpu_config
from tasks.titles.config import Profile, load_profile
from tasks.titles.errors import ConfigError

TWO = ["art.trainer_gpus=[0]", "art.inference_gpus=[1]"]


def qwen(*overrides: str) -> Profile:
    return load_profile("qwen-0.5b", overrides)


@pytest.mark.parametrize(("inference", "shown"), [(1, None), (3, None), (1, "0,1")])
def test_two_gpus_are_told_to_art_and_are_to_its_liking(
    inference: int, shown: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from art.dev.validate import is_dedicated_mode, validate_dedicated_config

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    profile = qwen("art.trainer_gpus=[0]", f"art.inference_gpus=[{inference}]")
    check_art_settings(profile)
    config = gpu_config(profile, 8448, 8704)
    assert (config["trainer_gpu_ids"], config["inference_gpu_ids"]) == ([0], [inference])
    validate_dedicated_config(config)
    assert is_dedicated_mode(config)
    assert "trainer_gpu_ids" not in gpu_config(qwen(), 8448, 8704)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["devices=2"], ["one GPU", "devices = 2", "art.inference_gpus = [1]"]),
        (TWO[:1], ["art.trainer_gpus = [0] and art.inference_gpus = []", "Set both"]),
        (TWO[1:], ["art.trainer_gpus = [] and art.inference_gpus = [1]", "Set both"]),
        (["art.trainer_gpus=[0]", "art.inference_gpus=[0]"], ["one other for vLLM"]),
        (["art.trainer_gpus=[1]", "art.inference_gpus=[0]"], ["trains on GPU 0"]),
        (["art.trainer_gpus=[0,1]", "art.inference_gpus=[2]"], ["trains on GPU 0"]),
        (["art.trainer_gpus=[0]", "art.inference_gpus=[1,2]"], ["one other for vLLM"]),
        ([*TWO, "device=cpu"], ["device = 'cuda'", "'cpu'"]),
    ],
)
def test_what_dedicated_mode_does_not_go_by_is_refused(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_art_settings(qwen(*overrides))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("shown", ["2,3", "", "GPU-1"])
def test_hidden_gpus_are_refused_because_art_would_take_them(shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    with pytest.raises(ConfigError, match=f"CUDA_VISIBLE_DEVICES={shown} shows"):
        check_art_settings(qwen(*TWO))
