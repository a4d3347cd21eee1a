"""The starter models as they lie in the project: what they must be able to do."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tasks.starter import paths, pretrain, world
from tasks.starter.lessons import Lessons
from tasks.starter.reward_labels import label, prediction_quality
from tasks.starter.train_reward import half_of, text_of
from tasks.titles.prompts import validator_messages


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(paths.BASE_MODEL)


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_pretrained(paths.BASE_MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def stories():
    return world.generate_stories()


def test_the_base_model_is_a_small_qwen2_in_bf16(base):
    assert base.config.model_type == "qwen2"
    assert base.num_parameters() <= 6_000_000
    with safe_open(paths.BASE_MODEL / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    for folder in (paths.BASE_MODEL, paths.REWARD_MODEL, paths.HELDOUT_REWARD_MODEL):
        assert not [path for path in Path(folder).iterdir() if path.suffix in {".bin", ".pt", ".pkl"}]


def test_digits_stand_alone_and_verdicts_are_single_tokens(tokenizer):
    assert tokenizer.tokenize("412")[-3:] == ["4", "1", "2"]
    assert len(tokenizer.encode("True")) == len(tokenizer.encode("False")) == 1


def test_verdicts_are_right_on_new_tales_in_both_classes(base, tokenizer):
    """At least 95% of each class, each question asked alone, as the validator asks it."""
    rng = random.Random("held-out verdicts")
    right: dict[bool, list[bool]] = {True: [], False: []}
    for _ in range(150):
        tale = world.tell(rng)
        for supported in (True, False):
            title = (world.supported_title if supported else world.unsupported_title)(rng, tale)[1]
            ids = tokenizer.apply_chat_template(
                list(validator_messages(tale.body, title)), add_generation_prompt=True, return_dict=False
            )
            with torch.inference_mode():
                answer = tokenizer.decode(base(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            right[supported].append(answer == str(supported))
    assert np.mean(right[True]) >= 0.95
    assert np.mean(right[False]) >= 0.95


def test_sampled_titles_are_mostly_supported(base, tokenizer):
    titles = pretrain.sampled_titles(base, tokenizer, seed=11, tales=96)
    assert np.mean([supported for _, _, supported in titles]) >= 0.8
    assert all(5 <= len(title) <= 120 for _, title, _ in titles)


@pytest.mark.parametrize("folder", [paths.REWARD_MODEL, paths.HELDOUT_REWARD_MODEL], ids=lambda path: path.name)
def test_a_reward_model_predicts_the_test_split_as_its_figures_say(folder, tokenizer, stories):
    classifier = AutoModelForSequenceClassification.from_pretrained(paths.BASE_MODEL, num_labels=1, dtype=torch.float32)
    model = PeftModel.from_pretrained(classifier, str(folder)).eval()
    test = [story for story in stories if story.split == "test"][:300]
    card = json.loads((folder / "figures.json").read_text())
    train = [label(s.score) for s in stories if s.split == "train" and half_of(s.id) == card["half"]]
    assert len(train) == card["stories"]
    assert np.mean(train) == pytest.approx(card["label_mean"])
    predicted = []
    with torch.inference_mode():
        for story in test:
            predicted.append(model(**tokenizer(text_of(story), return_tensors="pt")).logits.item())
    figures = prediction_quality(predicted, [label(story.score) for story in test], card["label_mean"])
    assert figures["rmse"] < 0.85 * figures["rmse_baseline"]
    assert figures["pearson"] == pytest.approx(card["test"]["pearson"], abs=0.08)


def test_lessons_are_the_same_for_the_same_seed_and_answers_do_not_see_each_other(base, tokenizer):
    lessons = Lessons(tokenizer, seed=5, rows=5)
    first, again = lessons[3], lessons[3]
    assert all((one == other).all() for one, other in zip(first, again, strict=True))
    judging = 1  # row 16: of each ten rows, those from place 4 to 8 judge
    tokens, positions, groups, _ = (torch.as_tensor(part[judging : judging + 1]) for part in first)
    assert groups.max() >= 2
    with torch.inference_mode():
        together = base(
            input_ids=tokens, attention_mask=pretrain.group_mask(groups), position_ids=positions, use_cache=False
        ).logits[0]
        for number in (1, 2):
            alone = (groups[0] == 0) | (groups[0] == number)
            plain = base(input_ids=tokens[:, alone]).logits[0]
            here = groups[0][alone] == number
            torch.testing.assert_close(together[groups[0] == number], plain[here], atol=1e-3, rtol=1e-3)
