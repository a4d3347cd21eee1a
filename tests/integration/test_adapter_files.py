"""The files of adapter and optimiser, for every kind of state that an optimiser may keep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_parts import load_base
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.optimization import Adafactor

from tasks.engines.adapter_files import load_training, save_training, trained_weights
from tasks.titles.errors import CheckpointError

CONFIG = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")


class Quantised(torch.optim.Optimizer):
    """Momentum in 8 bits, as bitsandbytes keeps it: codes and a step count per weight, one map of codes for all."""

    def __init__(self, weights: list[torch.nn.Parameter]) -> None:
        super().__init__(weights, {"lr": 0.01})
        self.map = torch.linspace(-1, 1, 256)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for weight in self.param_groups[0]["params"]:
            state = self.state[weight]
            if not state:
                codes = torch.full(weight.shape, 128, dtype=torch.uint8)
                state.update(step=0, codes=codes, map=self.map, largest=torch.ones(1, dtype=torch.float64))
            state["step"] += 1
            momentum = 0.9 * state["map"][state["codes"].long()] * state["largest"] + weight.grad
            state["largest"] = momentum.abs().max()[None]
            state["codes"] = ((momentum / state["largest"] + 1) * 127.5).round().to(torch.uint8)
            weight.sub_(weight.grad.sign() * momentum.abs().float(), alpha=0.01 / state["step"])


Maker = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Maker] = {
    "AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.01),
    "fused AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.01, fused=True),
    # Two groups, as Hugging Face's trainer makes them.
    "AdamW in groups": lambda weights: torch.optim.AdamW(
        [{"params": weights[1::2]}, {"params": weights[::2], "weight_decay": 0.0}], lr=0.01
    ),
    "Adafactor": lambda weights: Adafactor(weights, lr=0.01, relative_step=False, beta1=0.9),
    "8 bits": Quantised,
}


def adapted(seed: int) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(load_base(), CONFIG)  # type: ignore[return-value]


def update(model: PeftModel, optimizer: torch.optim.Optimizer, seed: int) -> dict[str, torch.Tensor]:
    """Make one update from a gradient that depends on `seed` alone, and return the weights after it."""
    generator = torch.Generator().manual_seed(seed)
    for weight in trained_weights(model).values():
        weight.grad = torch.randn(weight.shape, generator=generator)
    optimizer.step()
    return {name: weight.detach().clone() for name, weight in trained_weights(model).items()}


def states(model: PeftModel, optimizer: torch.optim.Optimizer) -> list[tuple[str, str, Any, Any]]:
    """Return each part of the state: its weight, its name, its type and its value."""
    return [
        (name, key, getattr(value, "dtype", type(value)), getattr(value, "tolist", lambda value=value: value)())
        for name, weight in trained_weights(model).items()
        for key, value in sorted(optimizer.state[weight].items())
    ]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_restored_optimiser_goes_on_where_it_was(tmp_path: Path, kind: str) -> None:
    first, second = adapted(1), adapted(2)
    one, two = (OPTIMIZERS[kind](list(trained_weights(model).values())) for model in (first, second))
    for seed in range(3):
        update(first, one, seed)
    save_training(first, one, tmp_path, {"name": kind})
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".md"}
    # What it has done before counts for nothing.
    update(second, two, 9)
    settings = [{**group, "params": None} for group in two.param_groups]
    load_training(second, two, tmp_path, lora_rank=8, lora_alpha=8)
    assert states(second, two) == states(first, one)
    assert [{**group, "params": None} for group in two.param_groups] == settings
    expected = update(first, one, 3)
    assert all(torch.equal(weight, expected[name]) for name, weight in update(second, two, 3).items())


def test_an_optimiser_that_has_made_no_step_is_restored_as_one(tmp_path: Path) -> None:
    model, other = adapted(1), adapted(2)
    save_training(model, torch.optim.AdamW(trained_weights(model).values()), tmp_path, {})
    optimizer = torch.optim.AdamW(trained_weights(other).values())
    update(other, optimizer, 1)
    load_training(other, optimizer, tmp_path, lora_rank=8, lora_alpha=8)
    assert not optimizer.state
    assert all(torch.equal(weight, trained_weights(model)[name]) for name, weight in trained_weights(other).items())


def test_the_adapter_that_trl_keeps_for_reference_stays_behind(tmp_path: Path) -> None:
    model, other = adapted(1), adapted(2)
    for one in (model, other):
        one.add_adapter("ref", CONFIG)
    optimizer = torch.optim.AdamW(trained_weights(model).values())
    update(model, optimizer, 1)
    save_training(model, optimizer, tmp_path, {})
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    load_training(other, torch.optim.AdamW(trained_weights(other).values()), tmp_path, lora_rank=8, lora_alpha=8)
    assert all(torch.equal(weight, trained_weights(model)[name]) for name, weight in trained_weights(other).items())


def test_a_state_that_is_no_number_is_refused(tmp_path: Path) -> None:
    model = adapted(1)
    optimizer = torch.optim.LBFGS(list(trained_weights(model).values()))
    optimizer.state[next(iter(trained_weights(model).values()))]["old_dirs"] = []
    with pytest.raises(TypeError, match="LBFGS keeps a list as 'old_dirs'"):
        save_training(model, optimizer, tmp_path, {})


def _other_weights(folder: Path) -> None:
    state = load_file(folder / "optimizer.safetensors")
    save_file({f"other.{name}": value for name, value in state.items()}, folder / "optimizer.safetensors")


def _other_model(folder: Path) -> None:
    adapter = load_file(folder / "adapter_model.safetensors")
    adapter.popitem()
    save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_other_weights, "optimiser of other weights"),
        (_other_model, "adapter of another model"),
        (lambda folder: (folder / "optimizer.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "cannot be read"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, change: Callable[[Path], Any], told: str) -> None:
    model = adapted(1)
    optimizer = torch.optim.AdamW(trained_weights(model).values())
    update(model, optimizer, 1)
    save_training(model, optimizer, tmp_path, {})
    change(tmp_path)
    with pytest.raises(CheckpointError, match=told):
        load_training(model, optimizer, tmp_path, lora_rank=8, lora_alpha=8)
