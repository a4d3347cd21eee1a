"""Shared prefixes against plain forward passes, one text at a time."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import starter_scorer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
)

from reward_server.check import plain_scores
from reward_server.client import RewardInput
from reward_server.encoding import tokenize
from reward_server.graphs import pad, shape_of, unpad
from reward_server.model_files import find_model
from reward_server.schemas import ScoreRequest
from reward_server.scorer import Scorer
from tasks.starter.paths import BASE_MODEL
from tasks.titles.group_statistics import JUDGE_NOISE

CLOSE = 1e-3
WORDS = ("Norwind", "ships", "a", "faster", "database", "for", "42", "labs", "<b>", "naïve", "標題", "in", "2024", ".")
Texts = list[list[int]]


def ids(generator: random.Random, least: int, most: int) -> list[int]:
    return [generator.randrange(2000) for _ in range(generator.randint(least, most))]


def titles_of(generator: random.Random, bodies: int, titles: int, longest: int) -> Texts:
    """Return texts in groups that begin alike, of random lengths."""
    texts = []
    for _ in range(bodies):
        body = ids(generator, 1, longest)
        texts += [body + ids(generator, 1, 30) for _ in range(generator.randint(1, titles))]
    return texts


def plain(scorer: Scorer, texts: Texts) -> list[float]:
    """Return the scores that the model's own forward pass gives, one text at a time."""
    return [scorer._plain_scores([text])[0] for text in texts]


def copy_of(scorer: Scorer, **changes: Any) -> Scorer:
    copy = Scorer.__new__(Scorer)
    copy.__dict__.update({**scorer.__dict__, **changes})
    return copy


@pytest.mark.parametrize("seed", range(12))
def test_groups_and_singles_of_random_lengths(seed: int) -> None:
    generator = random.Random(seed)
    longest = (5, 40, 200, 700)[seed % 4]
    texts = titles_of(generator, bodies=4, titles=6, longest=longest)
    texts += [ids(generator, 1, longest) for _ in range(seed % 3)]
    generator.shuffle(texts)
    scorer = starter_scorer()
    assert scorer.score_tokens(texts) == pytest.approx(plain(scorer, texts), abs=CLOSE)
    apart = copy_of(scorer, shares_prefixes=False)
    assert apart.score_tokens(texts) == pytest.approx(plain(scorer, texts), abs=CLOSE)


@pytest.mark.parametrize("longest", [20, 200, 900])
@pytest.mark.parametrize("seed", range(4))
def test_passes_padded_to_the_shape_of_a_graph(seed: int, longest: int) -> None:
    generator = random.Random(seed)
    texts = titles_of(generator, bodies=4, titles=6, longest=longest)
    texts = sorted(texts + [ids(generator, 1, longest) for _ in range(seed)])
    scorer = starter_scorer()
    passes = scorer._passes
    assert passes is not None
    inputs = passes._inputs(texts, sorted(scorer.divide(texts), key=lambda run: not run.branches))
    shape = shape_of(inputs)
    assert shape is not None
    padded = pad(inputs, shape, scorer._pad_id, -1)
    with torch.inference_mode():
        scores = unpad(passes._logits(padded), inputs, padded)
        torch.testing.assert_close(scores, passes._logits(inputs), atol=CLOSE, rtol=0)


BODY = list(range(100, 160))
EDGES: dict[str, Texts] = {
    "one text": [BODY],
    "one token": [[5]],
    "identical": [[*BODY, 7]] * 6,
    "identical, one token each": [[5]] * 3,
    "one token differs at the end": [[*BODY, token] for token in range(6)],
    "one token differs in the middle": [[*BODY[:30], token, *BODY[30:]] for token in range(6)],
    "one token differs at the start": [[token, *BODY] for token in range(6)],
    "each is the beginning of the next": [BODY[:length] for length in range(30, 60, 6)],
    "two bodies with one beginning": [[*BODY, branch, *BODY, title] for branch in (1, 2) for title in range(3)],
    "a short and a long body": [[*BODY[:3], 1], [*BODY[:3], 2], *([*BODY * 8, 3, title] for title in range(4))],
    "tokens like padding": [[*BODY, 2045, title, 7] for title in (2045, 2046)],
}


@pytest.mark.parametrize("texts", EDGES.values(), ids=EDGES)
def test_edges(texts: Texts) -> None:
    scorer = starter_scorer()
    scores = scorer.score_tokens(texts)
    assert scores == pytest.approx(plain(scorer, texts), abs=CLOSE)
    backwards = scorer.score_tokens(texts[::-1])[::-1]
    assert backwards == pytest.approx(scores, abs=JUDGE_NOISE)


def test_a_score_does_not_depend_on_its_batch() -> None:
    generator = random.Random(5)
    scorer = starter_scorer()
    texts = titles_of(generator, bodies=3, titles=6, longest=300)
    alone = [scorer.score_tokens([text])[0] for text in texts]
    largest = 0.0
    for _ in range(6):
        batch = generator.sample(range(len(texts)), k=generator.randint(2, len(texts)))
        company = titles_of(generator, bodies=2, titles=4, longest=400)
        scores = scorer.score_tokens([texts[index] for index in batch] + company)
        largest = max(largest, *(abs(score - alone[index]) for index, score in zip(batch, scores, strict=False)))
    assert largest < JUDGE_NOISE / 4


TITLES = ("Norwind ships", '"Norwind" ships', ">", "<b>ships</b>", "\n x", "標題 🚀", "n" * 300, " Norwind ships ", "1")


@pytest.mark.parametrize("sentences", [0, 1, 30, 4000])
def test_titles_whose_tokens_touch_the_border_and_bodies_that_are_cut(sentences: int) -> None:
    requests = [
        ScoreRequest(title=title, scraped_body="Norwind ships <b>42</b> databases." * sentences) for title in TITLES
    ]
    scorer = starter_scorer()
    encoded = scorer.encode(requests)
    lengths = [len(text) for text in encoded]
    if sentences == 4000:
        assert min(lengths) > scorer.max_length - 8
    assert any(run.branches for run in scorer.divide(sorted(encoded)))
    assert scorer.score_texts(requests) == pytest.approx(plain(scorer, encoded), abs=CLOSE)


def test_an_empty_title() -> None:
    # No request may carry one; what is left of a text then is still scored rightly.
    scorer = starter_scorer()
    [full] = scorer.encode([ScoreRequest(title="A title", scraped_body="Norwind ships. " * 20)])
    texts = [
        tokenize(scorer._tokenizer, [scorer._tokenizer.decode(full).replace("A title", title)])["input_ids"][0]
        for title in ("A title", "", "A")
    ]
    assert scorer.score_tokens(texts) == pytest.approx(plain(scorer, texts), abs=CLOSE)


def test_titles_against_transformers_alone() -> None:
    generator = random.Random(2)
    inputs = [
        RewardInput(
            " ".join(generator.choices(WORDS, k=generator.randint(1, 12))), body, by=generator.choice(["", "dang"])
        )
        for body in (" ".join(generator.choices(WORDS, k=count)) for count in (3, 60, 250))
        for _ in range(6)
    ]
    generator.shuffle(inputs)
    requests = [ScoreRequest(title=item.title, by=item.by, scraped_body=item.scraped_body) for item in inputs]
    expected = plain_scores(find_model("starter"), inputs, 2048)
    assert starter_scorer().score_texts(requests) == pytest.approx(expected, abs=CLOSE)


# other models

SIZES: dict[str, Any] = {"vocab_size": 2048, "num_labels": 1, "pad_token_id": 2045}
DECODER = {
    **SIZES, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
Make = Callable[[], PretrainedConfig]
SHARING: dict[str, Make] = {
    "Llama": lambda: LlamaConfig(**DECODER),
    "Qwen2": lambda: Qwen2Config(**DECODER),
    "a window that is never reached": lambda: Qwen2Config(
        **DECODER, use_sliding_window=True, sliding_window=256, max_window_layers=0
    ),
    "GPT-2": lambda: GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=256),
}
PLAIN: dict[str, tuple[Make, str]] = {
    "an encoder": (
        lambda: BertConfig(
            **SIZES, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=256,
        ),
        "no 'score' layer",
    ),
    "a sliding window": (
        lambda: Qwen2Config(**DECODER, use_sliding_window=True, sliding_window=8, max_window_layers=0),
        "reaches back 8 tokens",
    ),
    "positions that depend on the batch": (
        lambda: LlamaConfig(**DECODER, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "rope_type dynamic",
    ),
    "tokens that see those behind them": (lambda: LlamaConfig(**DECODER, is_causal=False), "its scores differ by"),
}  # fmt: skip


def saved(config: PretrainedConfig, folder: Path) -> Scorer:
    """Return a scorer of a random model of `config` whose scores differ clearly from text to text."""
    torch.manual_seed(4)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if (weight.dim() > 1 and "score" in name) or "proj" in name or "c_attn.weight" in name:
                weight.mul_(10)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE_MODEL).save_pretrained(folder)
    return Scorer(find_model(str(folder)), device="cpu", dtype=torch.float32, max_length=256)


@pytest.mark.parametrize("make", SHARING.values(), ids=SHARING)
def test_other_decoders_share(make: Make, tmp_path: Path) -> None:
    scorer = saved(make(), tmp_path)
    assert scorer.shares_prefixes
    texts = titles_of(random.Random(1), bodies=3, titles=5, longest=150)
    expected = plain(scorer, texts)
    assert scorer.score_tokens(texts) == pytest.approx(expected, abs=CLOSE)
    assert max(expected) - min(expected) > 100 * CLOSE


@pytest.mark.parametrize(("make", "reason"), PLAIN.values(), ids=PLAIN)
def test_what_cannot_share_is_scored_plainly_and_said(
    make: Make, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="reward_server"):
        scorer = saved(make(), tmp_path)
    assert not scorer.shares_prefixes
    assert reason in caplog.text
    texts = titles_of(random.Random(1), bodies=3, titles=5, longest=150)
    assert scorer.score_tokens(texts) == pytest.approx(plain(scorer, texts), abs=CLOSE)


def test_bfloat16_with_an_adapter_that_is_not_merged() -> None:
    scorer = Scorer(find_model("starter"), device="cpu", dtype=torch.bfloat16, max_length=2048)
    assert scorer.shares_prefixes
    texts = titles_of(random.Random(1), bodies=3, titles=5, longest=150)
    assert scorer.score_tokens(texts) == pytest.approx(plain(scorer, texts), abs=0.1)


def test_switched_off() -> None:
    scorer = Scorer(find_model("starter"), device="cpu", dtype=torch.float32, max_length=99, prefix_sharing=False)
    assert not scorer.shares_prefixes
    assert not any(run.branches for run in scorer.divide([[1, 2, 3], [1, 2, 4]]))
    assert scorer.version == starter_scorer().version
