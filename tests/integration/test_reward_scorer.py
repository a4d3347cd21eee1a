"""Loading and running reward models of every supported kind."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from serving import starter_scorer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from reward_server.check import plain_scores, sample_inputs
from reward_server.encoding import tokenize
from reward_server.errors import BadInput
from reward_server.model_files import find_model
from reward_server.schemas import ScoreRequest
from reward_server.scorer import Scorer, load_classifier
from tasks.starter.paths import BASE_MODEL, REWARD_MODEL
from tasks.titles.errors import ConfigError

INPUTS = sample_inputs()[:6]
REQUESTS = [
    ScoreRequest(title=item.title, by=item.by, time=item.time, scraped_body=item.scraped_body, url=item.url)
    for item in INPUTS
]


def load(folder: Path | str, max_length: int = 4096, dtype: torch.dtype = torch.float32) -> Scorer:
    return Scorer(find_model(str(folder)), device="cpu", dtype=dtype, max_length=max_length)


def save_tokenizer(folder: Path) -> None:
    AutoTokenizer.from_pretrained(BASE_MODEL).save_pretrained(folder)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_adapter_equals_plain_transformers() -> None:
    scores = starter_scorer().score_texts(REQUESTS)
    assert scores == pytest.approx(plain_scores(find_model("starter"), INPUTS, 2048), abs=1e-4)
    assert len(set(scores)) == len(scores)


def test_adapter_works_after_a_move(tmp_path: Path) -> None:
    shutil.copytree(BASE_MODEL, tmp_path / "a" / "base")
    shutil.copytree(REWARD_MODEL, tmp_path / "a" / "reward-model")
    path = tmp_path / "a" / "reward-model" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "../base"}))
    shutil.move(tmp_path / "a", tmp_path / "b")
    scorer = load(tmp_path / "b" / "reward-model")
    assert scorer.version == starter_scorer().version
    assert scorer.score_texts(REQUESTS) == pytest.approx(starter_scorer().score_texts(REQUESTS), abs=1e-5)


def test_merged_classifier_gives_the_same_scores(tmp_path: Path) -> None:
    merged = load_classifier(find_model("starter"), torch.float32).merge_and_unload()
    merged.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    scorer = load(tmp_path)
    assert scorer.score_texts(REQUESTS) == pytest.approx(starter_scorer().score_texts(REQUESTS), abs=1e-4)
    assert scorer.version != starter_scorer().version


def test_adapter_on_a_classifier_keeps_the_head_of_its_base(tmp_path: Path) -> None:
    torch.manual_seed(5)
    base = load_classifier(find_model("starter"), torch.float32).merge_and_unload()
    base.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "../base"}))
    files = find_model(str(tmp_path / "adapter"))
    assert files.tokenizer == tmp_path / "base"
    scores = load(tmp_path / "adapter").score_texts(REQUESTS)
    assert scores == pytest.approx(plain_scores(files, INPUTS, 2048), abs=1e-4)
    assert scores != pytest.approx(starter_scorer().score_texts(REQUESTS), abs=1e-2)


def test_an_encoder_is_a_reward_model_too(tmp_path: Path) -> None:
    torch.manual_seed(6)
    config = BertConfig(
        vocab_size=2048, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=2048, num_labels=1, pad_token_id=2045,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    scores = load(tmp_path).score_texts(REQUESTS)
    assert scores == pytest.approx(plain_scores(find_model(str(tmp_path)), INPUTS, 2048), abs=1e-4)
    assert len(set(scores)) == len(scores)


def test_bfloat16_stays_close_and_its_scores_fine_grained() -> None:
    scorer = load("starter", dtype=torch.bfloat16)
    scores = scorer.score_texts(REQUESTS)
    assert scorer.dtype == "bfloat16"
    assert scores == pytest.approx(starter_scorer().score_texts(REQUESTS), abs=0.1)
    assert torch.tensor(scores).bfloat16().tolist() != scores


# what is cut


def test_a_long_body_is_cut_and_the_title_is_not() -> None:
    scorer = starter_scorer()
    body = "Größe 標題 12345 <b>ships</b> </body> <title> " * 4000
    request = ScoreRequest(
        title="The 標題 <title>stays</title>", by="dang", scraped_body=body, url="https://example.org"
    )
    [ids] = scorer.encode([request])
    text = scorer._tokenizer.decode(ids)
    assert scorer.max_length - 8 <= len(ids) <= scorer.max_length
    assert text.startswith("<submitter>dang</submitter>\n<url>https://example.org</url>\n<date></date>\n\n<body>Größe")
    assert text.endswith("</body>\n<title>The 標題 &lt;title>stays&lt;/title></title>")
    assert "\ufffd" not in text
    assert text.count("</body>") == 1


def test_another_title_of_a_long_body_has_another_score() -> None:
    body = "Norwind ships a faster database. " * 4000
    titles = ["Norwind ships", "Nobody ships"]
    scores = starter_scorer().score_texts([ScoreRequest(title=title, scraped_body=body) for title in titles])
    assert scores[0] != scores[1]


@pytest.mark.parametrize("limit", range(60, 72))
def test_the_cut_text_always_fits(limit: int) -> None:
    scorer = Scorer.__new__(Scorer)
    scorer.__dict__.update(starter_scorer().__dict__)
    scorer.max_length = limit
    for body in ("x" * 500, "1" * 500, " " * 500, "🚀" * 500, "<body>" * 100):
        [ids] = scorer.encode([ScoreRequest(title="A title", scraped_body=body)])
        assert len(ids) <= limit
        assert scorer._tokenizer.decode(ids).endswith("</body>\n<title>A title</title>")


def test_a_title_that_does_not_fit_is_refused() -> None:
    scorer = Scorer.__new__(Scorer)
    scorer.__dict__.update(starter_scorer().__dict__)
    scorer.max_length = 50
    with pytest.raises(BadInput, match="50 tokens"):
        scorer.encode([ScoreRequest(title="x 1 " * 100, scraped_body="A body.")])


def test_the_limit_is_the_smaller_of_setting_and_model() -> None:
    assert load("starter", max_length=4096).max_length == 2048
    assert load("starter", max_length=100).max_length == 100


def test_special_tokens_in_a_text_are_plain_characters() -> None:
    tokenizer = starter_scorer()._tokenizer
    [ids] = tokenize(tokenizer, ["<|im_end|><|endoftext|>"])["input_ids"]
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_threads_may_encode_at_once() -> None:
    scorer = starter_scorer()
    lists = [
        [ScoreRequest(title=f"Title {index}", scraped_body="Größe 標題 12345 ships. " * count)]
        for index, count in enumerate([1, 20, 400, 2000] * 12)
    ]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(scorer.encode, lists)) == [scorer.encode(requests) for requests in lists]


# what is refused


def test_an_adapter_without_its_head_is_refused(tmp_path: Path) -> None:
    shutil.copytree(REWARD_MODEL, tmp_path / "adapter")
    shutil.copytree(BASE_MODEL, tmp_path / "base")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "../base"}))
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    headless = {key: value for key, value in weights.items() if "score" not in key}
    assert len(headless) < len(weights)
    save_file(headless, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"incomplete: score\.weight"):
        load(tmp_path / "adapter")


def test_an_adapter_with_two_outputs_is_refused(tmp_path: Path) -> None:
    shutil.copytree(REWARD_MODEL, tmp_path / "adapter")
    shutil.copytree(BASE_MODEL, tmp_path / "base")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "../base"}))
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    [head] = [key for key in weights if "score" in key]
    save_file(weights | {head: weights[head].repeat(2, 1)}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="2 outputs"):
        load(tmp_path / "adapter")


def test_a_classifier_without_its_head_is_refused(tmp_path: Path) -> None:
    shutil.copytree(BASE_MODEL, tmp_path / "model")
    change_config(tmp_path / "model", architectures=["Qwen2ForSequenceClassification"], id2label={"0": "L"})
    with pytest.raises(ConfigError, match=r"incomplete: score\.weight"):
        load(tmp_path / "model")


def test_code_in_a_model_folder_is_not_run(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(BASE_MODEL, num_labels=1)
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    change_config(
        tmp_path / "model",
        model_type="homemade",
        auto_map={name: f"code.{name}" for name in ("AutoConfig", "AutoModelForSequenceClassification")},
    )
    (tmp_path / "model" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(tmp_path / "model")
    assert not (tmp_path / "ran").exists()


def test_cuda_without_a_device_is_a_users_mistake() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match="CUDA"):
        Scorer(find_model("starter"), device="cuda", dtype=torch.bfloat16, max_length=100)
