"""The sampler against plain forward passes of `transformers`, with random lengths and random company."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from cpu_parts import load_base, load_with_adapter, plain_logprobs, random_ids, write_adapter
from transformers import PreTrainedModel

from tasks.engines.cpu.cores import Cores
from tasks.engines.cpu.decoder import Decoder
from tasks.engines.cpu.sampler import Completion, Generation, NotFinite, generate, prompt_logprobs
from tasks.engines.cpu.weights import check_supported, copy_state, decoder_weights, merge_adapter
from tasks.titles.errors import CheckpointError, ConfigError

END = frozenset({2047})


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return load_base()


@pytest.fixture(scope="module")
def decoder(base: PreTrainedModel) -> Decoder:
    return Decoder(decoder_weights(copy_state(base), base.config))


def assert_as_plain(model: PreTrainedModel, requests: list[Generation], completions: list[Completion]) -> None:
    for request, completion in zip(requests, completions, strict=True):
        assert 1 <= len(completion.tokens) <= request.max_tokens
        expected = plain_logprobs(model, list(request.prompt), completion.tokens)
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def mixed_requests(seed: int) -> list[Generation]:
    """Return requests of every kind: alone, several of one prompt, and several on one long prefix."""
    rng = random.Random(seed)
    requests = []
    for _ in range(3):
        prompt = random_ids(rng, rng.randrange(1, 90))
        requests += [Generation(prompt, rng.randrange(1, 14), (rng.randrange(99),)) for _ in range(rng.randrange(1, 5))]
    for _ in range(2):
        body = random_ids(rng, rng.randrange(60, 120))
        for _ in range(rng.randrange(2, 6)):
            prompt = body + random_ids(rng, rng.randrange(1, 40))
            requests.append(Generation(prompt, rng.randrange(1, 14), (rng.randrange(99),)))
    rng.shuffle(requests)
    return requests


@pytest.mark.parametrize("seed", range(4))
def test_logprobs_are_those_of_a_plain_forward_pass(
    base: PreTrainedModel, decoder: Decoder, cores: Cores, seed: int
) -> None:
    requests = mixed_requests(seed)
    assert_as_plain(base, requests, generate(decoder, requests, cores))


def test_long_completions_grow_their_cache(base: PreTrainedModel, decoder: Decoder, cores: Cores) -> None:
    rng = random.Random(9)
    body = random_ids(rng, 50)
    requests = [Generation(body + random_ids(rng, count), 75, (count,)) for count in (3, 20, 31, 32, 33)]
    completions = generate(decoder, requests, cores)
    assert [len(one.tokens) for one in completions] == [75] * 5
    assert_as_plain(base, requests, completions)


def test_prefix_sharing_changes_nothing_but_the_work(
    decoder: Decoder, cores: Cores, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(4)
    body = random_ids(rng, 150)
    requests = [Generation(body + random_ids(rng, 10 + 3 * i), 8, (i,), 0.0) for i in range(6)]
    read: list[int] = []
    prefill = Decoder.prefill

    def counting(self: Decoder, token_ids: tuple[int, ...]) -> object:
        read.append(len(token_ids))
        return prefill(self, token_ids)

    monkeypatch.setattr(Decoder, "prefill", counting)
    shared = generate(decoder, requests, cores)
    assert read == [150]
    read.clear()
    alone = [generate(decoder, [request], cores)[0] for request in requests]
    assert read == [len(request.prompt) for request in requests]
    for one, other in zip(shared, alone, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_the_tokens_of_a_request_do_not_depend_on_its_company(decoder: Decoder, cores: Cores) -> None:
    rng = random.Random(2)
    requests = [
        Generation(prompt, 12, (number, generation), 1.0, END)
        for number, prompt in enumerate(random_ids(rng, rng.randrange(20, 80)) for _ in range(4))
        for generation in range(3)
    ]
    together = generate(decoder, requests, cores)
    backwards = generate(decoder, requests[::-1], cores)[::-1]
    one_core = Cores(1)
    try:
        alone = [generate(decoder, [request], one_core)[0] for request in requests]
    finally:
        one_core.close()
    for one, other, third in zip(together, backwards, alone, strict=True):
        assert one.tokens == other.tokens == third.tokens
        assert one.logprobs == pytest.approx(third.logprobs, abs=1e-5)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    # Another seed, another title: otherwise the above would hold for a sampler that ignores seeds.
    assert len({tuple(one.tokens) for one in together[:3]}) > 1


def test_greedy_is_what_transformers_generates(base: PreTrainedModel, decoder: Decoder, cores: Cores) -> None:
    rng = random.Random(6)
    prompts = [random_ids(rng, count) for count in (5, 33, 64)]
    completions = generate(decoder, [Generation(prompt, 20, (0,), 0.0, END) for prompt in prompts], cores)
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = torch.tensor([prompt])
        expected = base.generate(  # type: ignore[operator]
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20, do_sample=False, eos_token_id=2047
        )
        assert completion.tokens == expected[0, len(prompt) :].tolist()


def test_sampling_follows_the_distribution(base: PreTrainedModel, decoder: Decoder, cores: Cores) -> None:
    prompt = random_ids(random.Random(8), 12)
    for temperature in (1.0, 0.5):
        completions = generate(decoder, [Generation(prompt, 1, (i,), temperature) for i in range(4000)], cores)
        with torch.inference_mode():
            logits = base(torch.tensor([prompt])).logits[0, -1].double()
        expected = (logits / temperature).softmax(-1)
        counts = np.bincount([one.tokens[0] for one in completions], minlength=len(expected)) / 4000
        # The total variation distance of 4,000 draws from their own distribution, by simulation.
        draws = torch.multinomial(expected, 4000 * 20, replacement=True).view(20, -1)
        usual = [0.5 * float((torch.bincount(d, minlength=len(expected)) / 4000 - expected).abs().sum()) for d in draws]
        distance = 0.5 * np.abs(counts - expected.numpy()).sum()
        assert distance < np.mean(usual) + 8 * np.std(usual)
        # Log-probabilities are the untempered ones, whatever the temperature of sampling.
        untempered = logits.log_softmax(-1)
        for one in completions[:50]:
            assert one.logprobs[0] == pytest.approx(float(untempered[one.tokens[0]]), abs=1e-4)


def test_a_stop_token_ends_the_completion_and_is_part_of_it(decoder: Decoder, cores: Cores) -> None:
    prompt = random_ids(random.Random(3), 30)
    whole = generate(decoder, [Generation(prompt, 10, (1,), 0.0)], cores)[0]
    assert whole.finish_reason == "length"
    stop = whole.tokens[4]
    first = whole.tokens.index(stop)
    request = Generation(prompt, 10, (1,), 0.0, frozenset({stop}))
    cut, other = generate(decoder, [request, Generation(prompt, 10, (1,), 0.0)], cores)
    assert cut.tokens == whole.tokens[: first + 1]
    assert cut.finish_reason == "stop"
    assert other.tokens == whole.tokens


def test_a_cancelled_request_leaves_the_batch_and_the_others_stay(decoder: Decoder, cores: Cores) -> None:
    prompt = random_ids(random.Random(3), 30)
    asked = [0]

    def cancelled(index: int) -> bool:
        asked[0] += index == 0
        return index == 0 and asked[0] > 5

    requests = [Generation(prompt, 40, (seed,)) for seed in (1, 2)]
    gone, stayed = generate(decoder, requests, cores, cancelled=cancelled)
    assert gone.finish_reason == "cancelled"
    assert 0 < len(gone.tokens) < 10
    assert stayed.tokens == generate(decoder, requests[1:], cores)[0].tokens


def test_prompt_logprobs_are_those_of_a_plain_forward_pass(base: PreTrainedModel, decoder: Decoder) -> None:
    prompt = list(random_ids(random.Random(7), 70))
    assert prompt_logprobs(decoder, prompt) == pytest.approx(plain_logprobs(base, prompt[:1], prompt[1:]), abs=1e-4)


def test_a_merged_adapter_is_what_peft_computes(base: PreTrainedModel, cores: Cores, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, 1, cores, disturbance=0.05)
    merged = Decoder(decoder_weights(merge_adapter(copy_state(base), folder), base.config))
    prompt = list(random_ids(random.Random(7), 40))
    with_adapter = plain_logprobs(load_with_adapter(folder), prompt[:1], prompt[1:])
    assert prompt_logprobs(merged, prompt) == pytest.approx(with_adapter, abs=1e-4)
    without = plain_logprobs(base, prompt[:1], prompt[1:])
    assert max(abs(one - other) for one, other in zip(with_adapter, without, strict=True)) > 0.05


def test_what_is_no_adapter_of_this_model_is_refused(base: PreTrainedModel, cores: Cores, tmp_path: Path) -> None:
    state = copy_state(base)
    with pytest.raises(CheckpointError, match="no readable LoRA adapter"):
        merge_adapter(state, tmp_path)
    folder = write_adapter(tmp_path, 1, cores, disturbance=0.0)
    smaller = {key: value[..., :100] if "q_proj" in key else value for key, value in state.items()}
    with pytest.raises(CheckpointError, match="adapter of another model"):
        merge_adapter(smaller, folder)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    with pytest.raises(CheckpointError, match="no plain LoRA"):
        merge_adapter(state, folder)


def test_other_architectures_and_broken_models_are_refused(base: PreTrainedModel, cores: Cores) -> None:
    config = type(base.config).from_dict({**base.config.to_dict(), "use_sliding_window": True})
    with pytest.raises(ConfigError, match="use_sliding_window"):
        check_supported(config)
    state = copy_state(base)
    state["model.norm.weight"] = state["model.norm.weight"] * float("nan")
    broken = Decoder(decoder_weights(state, base.config))
    with pytest.raises(NotFinite):
        generate(broken, [Generation((1, 2, 3), 4, (0,))], cores)
