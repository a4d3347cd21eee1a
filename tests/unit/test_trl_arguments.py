"""What profiles mean to TRL: every argument is a real one, and what TRL would not follow is refused."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import wait_until_gone

from tasks.engines.cpu.settings import CpuSettings
from tasks.engines.trl_engine.arguments import (
    PROCESS,
    SAID_TO_UNSLOTH,
    check_trl_settings,
    grpo_arguments,
    launch_command,
    lora_arguments,
    optimizer_settings,
    trainer_environment,
    warmup_factor,
)
from tasks.titles.child_process import ChildProcess
from tasks.titles.config import Profile, load_profile, profile_names
from tasks.titles.errors import ConfigError


def qwen(*overrides: str) -> Profile:
    return load_profile("qwen-0.5b", overrides)


def arguments(profile: Profile, **options: Any) -> dict[str, Any]:
    return grpo_arguments(profile, steps=7, output_dir=Path("out"), **options)


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_can_be_trained_with_trl(name: str) -> None:
    check_trl_settings(load_profile(name))


@pytest.mark.parametrize(
    ("profile", "per_device", "passes"),
    [
        (load_profile("starter"), 12, 4),
        (load_profile("starter", ["trl.micro_batch=48"]), 48, 1),
        (load_profile("starter", ["trl.micro_batch=100"]), 48, 1),
        (load_profile("starter", ["trl.micro_batch=1"]), 1, 48),
        (load_profile("starter", ["group_size=5", "groups_per_step=3", "trl.micro_batch=3"]), 3, 5),
        (qwen(), 6, 1),
        (qwen("trl.micro_batch=12"), 6, 1),
        (qwen("groups_per_step=4"), 6, 4),
        (qwen("groups_per_step=4", "devices=2"), 6, 2),
        (qwen("devices=3"), 2, 1),
        (qwen("devices=6"), 1, 1),
    ],
)
def test_a_step_is_one_update_on_all_its_titles(profile: Profile, per_device: int, passes: int) -> None:
    chosen = arguments(profile)
    assert chosen["per_device_train_batch_size"] == per_device
    assert chosen["gradient_accumulation_steps"] == chosen["steps_per_generation"] == passes
    assert chosen["num_iterations"] == 1
    assert profile.devices * per_device * passes == profile.groups_per_step * profile.group_size


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trl.micro_batch=5"], ["1 x 6 = 6 titles", "trl.micro_batch = 5", "one of 1, 2, 3, 6."]),
        (["groups_per_step=8", "trl.micro_batch=7"], ["48 titles", "1, 2, 3, 4, 6, 8, 12, 16, 24, 48."]),
        (["groups_per_step=4", "devices=2", "trl.micro_batch=5"], ["12 for each of 2", "1, 2, 3, 4, 6, 12."]),
        (
            ["devices=4"],
            ["6 titles", "4 devices", "groups_per_step to a multiple of 2", "devices to one of 1, 2, 3, 6"],
        ),
        (["devices=7"], ["groups_per_step to a multiple of 7"]),
        (["device=cpu", "trl.unsloth=true"], ["a CPU", "trl.unsloth", "device = 'cuda'"]),
        (["device=cpu", "trl.vllm_mode=server"], ["a CPU", "trl.vllm_mode = 'server'"]),
        (["trl.vllm_mode=server"], ["VLLM_SERVER_URL", "vllm serve Qwen/Qwen2.5-0.5B-Instruct", '"backend": "nccl"']),
        (["trl.vllm_mode=server", "trl.unsloth=true"], ["Unsloth", "'colocate'"]),
        (["groups_per_step=2", "devices=2", "trl.unsloth=true"], ["Unsloth", "devices = 2"]),
        (["trl.server_gpus=[1]", "trl.trainer_gpus=[0]"], ["trl.server_gpus = [1]", "'server'"]),
        (["trl.vllm_mode=server", "trl.server_gpus=[1]"], ["trl.server_gpus = [1]", "trl.trainer_gpus", "1 device(s)"]),
        (["trl.trainer_gpus=[0,1]"], ["trl.trainer_gpus = [0, 1]", "devices = 1"]),
        (["trl.vllm_mode=server", "trl.server_gpus=[0]", "trl.trainer_gpus=[0]"], ["each GPU once"]),
        (["devices=2", "trl.trainer_gpus=[3,3]"], ["each GPU once"]),
    ],
)
def test_what_trl_would_not_follow_is_refused_with_what_it_would(overrides: list[str], words: list[str]) -> None:
    for refused in (lambda: check_trl_settings(qwen(*overrides)), lambda: arguments(qwen(*overrides))):
        with pytest.raises(ConfigError) as caught:
            refused()
        for word in words:
            assert word in str(caught.value)


@pytest.mark.parametrize(
    "override", ["updates_per_step=one", "updates_per_step=per_sequence", "packed_sequence_length=512"]
)
def test_what_only_art_reads_changes_nothing(override: str) -> None:
    assert arguments(qwen(override)) == arguments(qwen())


@pytest.mark.parametrize(("max_steps", "warned"), [(499, True), (500, False)])
def test_a_warm_up_longer_than_the_run_is_warned_of(
    max_steps: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check_trl_settings(qwen(f"max_steps={max_steps}"))
    assert ("never reaches it" in caplog.text) is warned


@pytest.mark.parametrize("loss", ["dapo", "grpo", "cispo"])
def test_the_starter_profile_makes_a_real_config(loss: str, tmp_path: Path) -> None:
    from trl import GRPOConfig

    profile = load_profile("starter", [f"loss.trl={loss}", "seed=5"])
    chosen = grpo_arguments(profile, steps=7, output_dir=tmp_path)
    config = GRPOConfig(**chosen)
    # `report_to` becomes an empty list, and nothing else is understood differently.
    different = {key for key, value in chosen.items() if getattr(config, key) != value}
    assert (different, config.report_to) == ({"report_to"}, [])
    assert config.generation_batch_size == 48
    assert (config.max_steps, config.seed, config.loss_type) == (7, 5, loss)
    assert (config.temperature, config.top_p, config.top_k, config.min_p) == (1.0, 1.0, 0, 0.0)
    assert (config.beta, config.max_grad_norm, config.learning_rate) == (0.0, 0.1, profile.learning_rate.trl)
    assert (config.epsilon, config.epsilon_high) == (0.2, 5.0 if loss == "cispo" else None)
    assert config.device.type == "cpu" and not config.use_vllm and not config.bf16


COLOCATE = {
    "vllm_mode": "colocate",
    "vllm_gpu_memory_utilization": 0.3,
    "vllm_max_model_length": 8192,
    "vllm_enable_sleep_mode": True,
    "generation_kwargs": {"detokenize": False},
}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], COLOCATE),
        (["trl.vllm_memory_share=0.5"], {**COLOCATE, "vllm_gpu_memory_utilization": 0.5}),
        (["trl.vllm_sleep=false"], {**COLOCATE, "vllm_enable_sleep_mode": False}),
        (["devices=2"], {**COLOCATE, "ddp_find_unused_parameters": False}),
        (["trl.vllm_mode=server"], {"vllm_mode": "server", "vllm_server_base_url": "http://127.0.0.1:8000"}),
        (["trl.unsloth=true"], {"vllm_mode": "colocate", "vllm_importance_sampling_correction": True}),
    ],
)
def test_a_gpu_generates_with_vllm(overrides: list[str], expected: dict[str, Any]) -> None:
    from trl import GRPOConfig

    chosen = arguments(qwen(*overrides), vllm_server_url="http://127.0.0.1:8000")
    fields = {field.name for field in dataclasses.fields(GRPOConfig) if field.init}
    assert set(chosen) <= fields
    own = {key: value for key, value in chosen.items() if key.startswith(("vllm_", "ddp_", "generation_"))}
    # Any free one: two runs on one machine must not meet.
    assert ("vllm_group_port" in own) is ("vllm_server_base_url" in own)
    assert own.pop("vllm_group_port", 1024) >= 1024
    assert own == expected
    assert (chosen["use_vllm"], chosen["bf16"], chosen["gradient_checkpointing"]) == (True, True, True)
    assert "use_cpu" not in chosen


@pytest.mark.parametrize("loss", ["dapo", "grpo", "cispo"])
def test_unsloth_is_told_what_trl_does_by_itself(loss: str) -> None:
    from trl import GRPOConfig

    defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    assert defaults["epsilon_high"] is None, "it is epsilon then"
    defaults["epsilon_high"] = 5.0 if loss == "cispo" else defaults["epsilon"]
    told = arguments(qwen("trl.unsloth=true", f"loss.trl={loss}"))
    assert SAID_TO_UNSLOTH.keys() <= told.keys()
    assert {name: told[name] for name in SAID_TO_UNSLOTH} == {name: defaults[name] for name in SAID_TO_UNSLOTH}
    plain = arguments(qwen(f"loss.trl={loss}"))
    assert {name: value for name, value in told.items() if name not in SAID_TO_UNSLOTH} == {
        name: value for name, value in plain.items() if name in told and name not in SAID_TO_UNSLOTH
    }


def test_both_engines_train_the_same_adapter_with_the_same_optimiser() -> None:
    from peft import LoraConfig

    profile, art = load_profile("starter"), CpuSettings()
    config = LoraConfig(**lora_arguments(profile))
    assert (config.r, config.lora_alpha) == (art.lora_rank, art.lora_alpha)
    assert (config.target_modules, config.lora_dropout, config.task_type) == ("all-linear", 0.0, "CAUSAL_LM")
    assert optimizer_settings(profile) == {
        "name": "adamw_torch",
        "betas": art.betas,
        "weight_decay": art.weight_decay,
    }
    assert optimizer_settings(qwen()) == {**optimizer_settings(profile), "name": "adamw_8bit"}


@pytest.mark.parametrize(
    ("step", "warmup_steps", "factor"),
    [(1, 0, 1.0), (1, 1, 1.0), (1, 4, 0.25), (3, 4, 0.75), (4, 4, 1.0), (5, 4, 1.0), (1, 500, 0.002), (5000, 500, 1.0)],
)
def test_the_learning_rate_warms_up_in_equal_parts(step: int, warmup_steps: int, factor: float) -> None:
    assert warmup_factor(step, warmup_steps) == factor


def test_processes_on_a_cpu_compute_in_float32() -> None:
    profile = load_profile("starter", ["devices=2"])
    command = launch_command(profile, Path("a.parquet"))
    assert command[command.index("--mixed_precision") + 1] == "no"
    assert command[command.index("--num_processes") + 1] == "2"
    assert arguments(profile)["ddp_find_unused_parameters"] is False


def test_one_device_needs_no_launcher() -> None:
    assert launch_command(qwen(), Path("a b.parquet")) == [sys.executable, "-m", PROCESS, "a b.parquet"]


@pytest.mark.parametrize("devices", [1, 2])
def test_the_trainer_can_have_an_environment_of_its_own(devices: int) -> None:
    python = Path("/env/bin/python")
    command = launch_command(qwen(f"devices={devices}"), Path("request.parquet"), python)
    assert command[0] == str(python) and sys.executable not in command


PROBE = """
import os, sys, time
import torch, torch.distributed as dist
from tasks.titles.child_process import end_with_stdin
end_with_stdin()
dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1]); dist.all_reduce(total)
facts = (os.environ["ACCELERATE_MIXED_PRECISION"], os.environ["ACCELERATE_DYNAMO_BACKEND"])
line = f"rank {dist.get_rank()} of {dist.get_world_size()} sum {total.item()} {facts} {sys.argv[1:]} pid {os.getpid()}"
sys.stdout.write(line + chr(10)); sys.stdout.flush()
time.sleep(600)
"""


def test_several_devices_are_launched_and_none_outlives_the_launcher(tmp_path: Path) -> None:
    """The real `accelerate launch`, with a module of the test's own in place of the trainer's."""
    (tmp_path / "probe.py").write_text(PROBE)
    command = launch_command(qwen("devices=2"), tmp_path / "request.parquet")
    command[command.index(PROCESS)] = "probe"
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    child = ChildProcess(
        [*command, "run id"], log_path=tmp_path / "log", environment={**os.environ, "PYTHONPATH": path}
    )
    try:
        for _ in range(600):
            lines = sorted(line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("rank "))
            if len(lines) == 2:
                break
            assert child.poll() is None, child.log_end()
            time.sleep(0.1)
        facts = f"of 2 sum 3 ('bf16', 'NO') {[str(tmp_path / 'request.parquet'), 'run id']} pid "
        assert [line.rpartition(" ")[0] + " " for line in lines] == [f"rank {rank} {facts}" for rank in range(2)]
        workers = [int(line.split()[-1]) for line in lines]
        # Each is in a session of its own: with the launcher killed, only their standard input reaches them.
        assert child.pid not in [os.getpgid(pid) for pid in workers]
        os.kill(child.pid, signal.SIGKILL)
    finally:
        child.stop()
    assert child.poll() == -signal.SIGKILL
    for pid in workers:
        wait_until_gone(pid)


@pytest.mark.parametrize(
    ("overrides", "there", "not_there"),
    [
        (["device=cpu"], {"OMP_WAIT_POLICY": "PASSIVE", "WANDB_MODE": "disabled"}, {"VLLM_NO_USAGE_STATS"}),
        ([], {"VLLM_NO_USAGE_STATS": "1"}, {"UNSLOTH_DISABLE_STATISTICS"}),
        (["trl.unsloth=true"], {"UNSLOTH_DISABLE_STATISTICS": "1"}, set()),
    ],
)
def test_the_environment_fits_the_device(overrides: list[str], there: dict[str, str], not_there: set[str]) -> None:
    environment = trainer_environment(qwen(*overrides))
    assert there.items() <= environment.items()
    assert not not_there & set(environment)


@pytest.mark.parametrize("installed", [True, False])
def test_flashinfer_is_used_where_it_is_installed(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flashinfer.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    if not installed:
        monkeypatch.setitem(sys.modules, "flashinfer", None)
    variable = trainer_environment(qwen()).get("VLLM_USE_FLASHINFER_SAMPLER")
    assert variable == (None if installed else "0")
