"""The local validator against the model it stands for: one unpadded chat at a time, and the server of ART's path."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_parts import ODD_TEXTS, load_base, load_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from training_parts import request
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tasks.engines.art_session import BASE_MODEL_NAME, open_session
from tasks.engines.trl_engine import validator
from tasks.engines.trl_engine.validator import LocalValidator, Verdict, verdict_tokens
from tasks.starter.paths import BASE_MODEL
from tasks.starter.tokenizer import CHAT_TEMPLATE
from tasks.starter.world import generate_stories
from tasks.titles.chat import ask, open_client
from tasks.titles.errors import ConfigError, UnreadableVerdict
from tasks.titles.judges import VERDICT_TOKENS
from tasks.titles.prompts import validator_messages
from tasks.titles.story import Story
from tasks.titles.together import together
from tasks.titles.verdict import parse_verdict

Pair = tuple[Story, str]
STORIES = generate_stories(40)
PAIRS: list[Pair] = [
    pair for story, other in itertools.pairwise(STORIES) for pair in ((story, story.title), (story, other.title))
]


def ragged_pairs(count: int) -> list[Pair]:
    """Return chats of very different lengths: bodies cut short or told several times, titles of all kinds."""
    rng = random.Random(4)
    pairs = []
    for number in range(count):
        story, other = rng.sample(STORIES, 2)
        body = " ".join([story.scraped_body, other.scraped_body, story.scraped_body])[: rng.randrange(900)]
        title = (story.title, other.title, ODD_TEXTS[number % len(ODD_TEXTS)])[number % 3]
        pairs.append((replace(story, scraped_body=body), title))
    return pairs


@torch.inference_mode()
def answer_alone(model: Any, pair: Pair) -> list[float]:
    """Return the first answer token's probabilities, by a forward pass of `transformers` over this chat alone."""
    chat = [dict(message) for message in validator_messages(pair[0].scraped_body, pair[1])]
    ids = load_tokenizer().apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return model(torch.tensor([ids])).logits[0, -1].softmax(-1).tolist()


def disturbed(model: PreTrainedModel) -> PeftModel:
    """Return `model` under an adapter of large random weights."""
    torch.manual_seed(8)
    config = LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, config)


def probabilities(verdicts: list[Verdict | UnreadableVerdict]) -> list[tuple[float, float]]:
    assert all(isinstance(verdict, Verdict) for verdict in verdicts)
    return [(verdict.true, verdict.false) for verdict in verdicts]


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return load_base()


@pytest.fixture(scope="module")
def ragged(base: PreTrainedModel) -> tuple[list[Pair], list[list[float]]]:
    pairs = ragged_pairs(60)
    return pairs, [answer_alone(base, pair) for pair in pairs]


@pytest.mark.parametrize(("tokens_per_pass", "passes"), [(65_536, 1), (3_000, None), (1, 60)])
def test_padding_changes_no_verdict(
    base: PreTrainedModel,
    ragged: tuple[list[Pair], list[list[float]]],
    tokens_per_pass: int,
    passes: int | None,
) -> None:
    pairs, alone = ragged
    shapes: list[torch.Size] = []
    hook = base.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    verdicts = LocalValidator(base, load_tokenizer(), tokens_per_pass=tokens_per_pass).judge(pairs)
    hook.remove()

    true, false = verdict_tokens(load_tokenizer())
    for verdict, single in zip(verdicts, alone, strict=True):
        likeliest = max(range(len(single)), key=single.__getitem__)
        if likeliest in (true, false):
            assert isinstance(verdict, Verdict)
            assert (verdict.true, verdict.false) == pytest.approx((single[true], single[false]), abs=1e-4)
            assert verdict.supported == (likeliest == true)
            assert verdict.neither == pytest.approx(1 - verdict.true - verdict.false)
        else:
            assert isinstance(verdict, UnreadableVerdict)
            assert verdict.neither == pytest.approx(1 - single[true] - single[false], abs=1e-4)
    assert {verdict.supported for verdict in verdicts if isinstance(verdict, Verdict)} == {True, False}

    assert passes is None or len(shapes) == passes
    assert all(rows * longest <= tokens_per_pass or rows == 1 for rows, longest in shapes)


def several_titles(rng: random.Random, most: int) -> list[Pair]:
    """Return up to `most` titles for each of some random bodies, all of them mixed up."""
    pairs = []
    for story in rng.sample(STORIES, 6):
        words = [rng.choice(rng.choice(STORIES).scraped_body.split()) for _ in range(rng.randrange(4, 150))]
        body = " ".join(words)
        titles = [other.title for other in rng.sample(STORIES, most)] + [*ODD_TEXTS, words[0], ""]
        titles = rng.sample(titles, rng.randint(1, most))
        pairs += [(replace(story, scraped_body=body), title) for title in (*titles, titles[0])]
    rng.shuffle(pairs)
    return pairs


@pytest.mark.parametrize(("seed", "most", "tokens_per_pass"), [(1, 6, 65_536), (2, 6, 900), (3, 30, 65_536)])
def test_titles_of_one_body_read_it_once(
    base: PreTrainedModel, seed: int, most: int, tokens_per_pass: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = several_titles(random.Random(seed), most)
    computed: list[int] = []
    hook = base.register_forward_pre_hook(
        lambda _, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    together = LocalValidator(base, load_tokenizer(), tokens_per_pass=tokens_per_pass).judge(pairs)
    shared = sum(computed)
    monkeypatch.setattr(validator, "_takes_masks", lambda _: False)
    alone = LocalValidator(base, load_tokenizer(), tokens_per_pass=1).judge(pairs)
    hook.remove()
    assert shared < 0.7 * (sum(computed) - shared)
    for one, other in zip(together, alone, strict=True):
        assert type(one) is type(other)
        assert one.neither == pytest.approx(other.neither, abs=1e-4)
        if isinstance(one, Verdict) and isinstance(other, Verdict):
            assert one.supported == other.supported
            assert (one.true, one.false) == pytest.approx((other.true, other.false), abs=1e-4)


def test_the_lengths_differ_enough_to_need_padding(ragged: tuple[list[Pair], list[list[float]]]) -> None:
    lengths = {len(story.scraped_body) for story, _ in ragged[0]}
    assert len(lengths) > 30
    assert max(lengths) > 5 * min(lengths)


@pytest.mark.parametrize("default", [True, False])
def test_the_tokenizer_may_answer_with_a_dict_by_default_or_with_a_list(
    base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, default: bool
) -> None:
    expected = LocalValidator(base, load_tokenizer()).judge(PAIRS[:2])
    tokenizer = load_tokenizer()
    render = tokenizer.apply_chat_template
    # As Unsloth does, with False.
    monkeypatch.setattr(
        tokenizer,
        "apply_chat_template",
        lambda *chats, **options: render(*chats, **{"return_dict": default, **options}),
    )
    assert LocalValidator(base, tokenizer).judge(PAIRS[:2]) == expected


def test_nothing_to_judge(base: PreTrainedModel) -> None:
    assert LocalValidator(base, load_tokenizer()).judge([]) == []


def test_the_adapter_is_off(base: PreTrainedModel) -> None:
    pairs = PAIRS[:20]
    expected = probabilities(LocalValidator(base, load_tokenizer()).judge(pairs))
    model = disturbed(load_base())
    true, _ = verdict_tokens(load_tokenizer())
    with_adapter = [answer_alone(model, pair)[true] for pair in pairs]
    assert max(abs(one - other) for one, (other, _) in zip(with_adapter, expected, strict=True)) > 0.3

    verdicts = LocalValidator(model, load_tokenizer()).judge(pairs)
    for one, other in zip(probabilities(verdicts), expected, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_model_is_left_as_it_was(training: bool, frozen: bool) -> None:
    model = disturbed(load_base()).train(training)
    # One part in the other mode, and one weight of another kind than its neighbours.
    part = model.get_submodule("base_model.model.model.layers.2.mlp").train(not training)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and not frozen)
    next(model.parameters()).requires_grad_(True)

    def state() -> Any:
        return (
            [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
            model.get_model_status().enabled,
        )

    before, answer = state(), answer_alone(model, PAIRS[0])
    gradients = []
    hook = part.register_forward_pre_hook(lambda *_: gradients.append(torch.is_grad_enabled()))
    LocalValidator(model, load_tokenizer()).judge(PAIRS[:4])
    hook.remove()
    assert gradients == [False]
    assert torch.is_grad_enabled()
    assert state() == before
    assert part.training is not training
    assert answer_alone(model, PAIRS[0]) == answer
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off_while_judging(base: PreTrainedModel) -> None:
    model = disturbed(AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32, attention_dropout=0.5))
    assert answer_alone(model.train(), PAIRS[0]) != answer_alone(model, PAIRS[0])
    verdicts = LocalValidator(model, load_tokenizer()).judge(PAIRS[:6])
    expected = LocalValidator(base, load_tokenizer()).judge(PAIRS[:6])
    for one, other in zip(probabilities(verdicts), probabilities(expected), strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_a_model_that_knows_neither_word_gives_no_verdict() -> None:
    torch.manual_seed(1)
    untrained = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(BASE_MODEL), dtype=torch.float32)
    for verdict in LocalValidator(untrained, load_tokenizer()).judge(PAIRS[:5]):
        assert isinstance(verdict, UnreadableVerdict)
        assert verdict.service == "validator"
        assert verdict.neither > 0.9


def test_a_broken_model_gives_no_verdict() -> None:
    model = load_base()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    for verdict in LocalValidator(model, load_tokenizer()).judge(PAIRS[:5]):
        assert isinstance(verdict, UnreadableVerdict)
        assert verdict.neither is None
        assert "not finite" in str(verdict)


def test_a_tokenizer_without_the_two_words_is_refused(base: PreTrainedModel) -> None:
    only_unknown = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=only_unknown, unk_token="[UNK]", chat_template=CHAT_TEMPLATE, name_or_path="one-word"
    )
    with pytest.raises(ConfigError, match="'one-word'"):
        LocalValidator(base, tokenizer)


async def test_the_verdicts_are_those_of_the_http_path(tmp_path: Path, reward_server_url: str) -> None:
    async with open_session(request(tmp_path / "run", reward_server_url)) as (session, _):
        client = open_client(session.base_url, session.api_key, concurrency=16)

        async def served(pair: Pair) -> bool:
            choice, *_ = await ask(
                client,
                "validator",
                model=BASE_MODEL_NAME,
                messages=validator_messages(pair[0].scraped_body, pair[1]),
                temperature=0.0,
                max_tokens=VERDICT_TOKENS,
            )
            return parse_verdict(choice.message.content or "")

        async with client:
            expected = await together(served(pair) for pair in PAIRS)
    verdicts = LocalValidator(disturbed(load_base()), load_tokenizer()).judge(PAIRS)
    assert len(PAIRS) >= 60
    assert [verdict.supported for verdict in verdicts] == expected
    # Human titles of the body are supported, those of another story are not.
    assert sum(expected[::2]) > 0.9 * len(expected[::2])
    assert sum(expected[1::2]) < 0.1 * len(expected[1::2])
