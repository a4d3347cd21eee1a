"""Which models are found, and which are refused before anything of them is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from reward_server.model_files import find_model
from tasks.starter.paths import BASE_MODEL, REWARD_MODEL
from tasks.titles.errors import ConfigError


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A copy of the starter base and reward model whose adapter names its base by a relative path."""
    for source, name in ((BASE_MODEL, "base"), (REWARD_MODEL, "reward-model")):
        shutil.copytree(source, tmp_path / name)
    point_adapter(tmp_path, "../base")
    return tmp_path


def point_adapter(models: Path, base: str | None) -> None:
    path = models / "reward-model" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))


def test_starter_is_the_embedded_model() -> None:
    files = find_model("starter")
    assert files.adapter == REWARD_MODEL
    assert files.base == BASE_MODEL
    assert files.version() == find_model(str(REWARD_MODEL)).version()


def test_adapter_and_base_can_be_moved_together(models: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = find_model(str(models / "reward-model"))
    assert before.base == models / "base"
    version = before.version()
    moved = tmp_path_factory.mktemp("elsewhere") / "models"
    shutil.move(models, moved)
    after = find_model(str(moved / "reward-model"))
    assert after.base == moved / "base"
    assert after.version() == version


def test_other_weights_are_another_version(models: Path) -> None:
    before = find_model(str(models / "reward-model")).version()
    for name in ("base/model.safetensors", "reward-model/adapter_model.safetensors"):
        weights = bytearray((models / name).read_bytes())
        weights[-1] ^= 1
        (models / name).write_bytes(weights)
        after = find_model(str(models / "reward-model")).version()
        assert after != before
        before = after


def test_a_pickled_base_is_refused(models: Path) -> None:
    (models / "base" / "model.safetensors").rename(models / "base" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"only pytorch_model\.bin.*safetensors"):
        find_model(str(models / "reward-model"))


def test_a_pickled_adapter_is_refused(models: Path) -> None:
    adapter = models / "reward-model"
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"only adapter_model\.bin.*safetensors"):
        find_model(str(adapter))


def test_a_missing_shard_is_named(models: Path) -> None:
    (models / "base" / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (models / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    (models / "base" / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(ConfigError, match=r"No model-00002-of-00002\.safetensors"):
        find_model(str(models / "reward-model"))


def test_a_language_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"one output.*Qwen2ForCausalLM"):
        find_model(str(BASE_MODEL))


@pytest.mark.parametrize(("labels", "fine"), [(1, True), (2, False), (3, False)])
def test_a_classifier_must_have_one_output(models: Path, labels: int, fine: bool) -> None:
    path = models / "base" / "config.json"
    names = {} if labels == 2 else {"id2label": {str(index): f"L{index}" for index in range(labels)}}
    config = json.loads(path.read_text()) | {"architectures": ["Qwen2ForSequenceClassification"]} | names
    path.write_text(json.dumps(config))
    if fine:
        assert find_model(str(models / "base")).adapter is None
    else:
        with pytest.raises(ConfigError, match=f"with {labels} labels"):
            find_model(str(models / "base"))


@pytest.mark.parametrize("base", ["../gone", "/nowhere/base", None])
def test_an_adapter_without_its_base_says_so(models: Path, base: str | None) -> None:
    point_adapter(models, base)
    with pytest.raises(ConfigError, match="base_model_name_or_path"):
        find_model(str(models / "reward-model"))


def test_an_adapter_on_an_adapter_is_refused(models: Path) -> None:
    shutil.copy(models / "reward-model" / "adapter_config.json", models / "base")
    with pytest.raises(ConfigError, match="itself an adapter"):
        find_model(str(models / "reward-model"))


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "not a name!"])
def test_what_is_no_model_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        find_model(name)


def test_damaged_json_is_named(models: Path) -> None:
    (models / "reward-model" / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"adapter_config\.json cannot be read"):
        find_model(str(models / "reward-model"))
