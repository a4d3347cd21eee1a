"""What a machine can run: GPUs as the driver shows them, packages against their pins, and each profile's verdict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tasks.services.doctor import Finding, findings, verdict
from tasks.services.environments import Environment, Package, environments, look_at, requirements
from tasks.services.gpus import Gpu, Gpus, read_table
from tasks.services.machine import Answer, Machine, Place, Port
from tasks.titles.config import ConfiguredSettings, Profile, load_profile
from tasks.titles.memory_estimate import GB

FOUND = (Package("vllm", "==0.22.1", "0.22.1"),)
H100 = Gpu(0, "NVIDIA H100 80GB HBM3", 80 * GB, 79 * GB)
ALONE = ConfiguredSettings(_env_file=None)  # type: ignore[call-arg]


def machine(**changes: object) -> Machine:
    """A machine on which everything can run."""
    whole = Machine(
        system="Linux x86_64",
        python="3.12.3",
        cores=16,
        memory_bytes=128 * GB,
        available_bytes=120 * GB,
        gpus=Gpus((H100,), "580.95.05", (13, 0)),
        environments=tuple(Environment(extra, "somewhere", FOUND) for extra in ("cpu", "gpu-art", "gpu-trl")),
        places=(Place("runs", "/r", 500 * GB, True), Place("hub cache", "/h", 500 * GB, True)),
        ports=(Port("prefect", 4200, None), Port("mlflow", 5000, None)),
        answers=(
            *(Answer(name, None, "not started") for name in ("prefect", "mlflow", "reward")),
            Answer("hub", "https://hub", "healthy"),
        ),
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


def without(extra: str) -> tuple[Environment, ...]:
    lacking = Environment(extra, "somewhere", (Package("vllm", "==0.22.1", "0.25.1"), Package("trl", "", None)))
    return tuple(lacking if one.extra == extra else one for one in machine().environments)


def profile(name: str, *changes: str) -> Profile:
    """A profile whose reward model is the starter's, which is always there."""
    return load_profile(name, ["reward_model=starter", *changes])


def test_a_machine_that_has_everything_runs_everything() -> None:
    for name in ("starter", "starter-gpu", "qwen-0.5b", "qwen-7b"):
        found = verdict(profile(name), machine(), ALONE)
        assert found.can_run and found.engines == {"art": (), "trl": ()}, name
    assert {one.state for one in findings(machine())} == {"ok"}


NO_GPU = Gpus((), problem="no NVIDIA driver: nvidia-smi is not there")
SMALL = Gpus((Gpu(0, "small", 8 * GB, 8 * GB),), "580", (13, 0))
OLD = Gpus((H100,), "535", (12, 2))
OFFLINE = (*machine().answers[:3], Answer("hub", "https://hub", "no answer within 3 s"))
FULL = (Place("runs", "/r", 1 * 10**6, True), Place("hub cache", "/h", 1 * GB, True))


@pytest.mark.parametrize(
    ("name", "changes", "art", "trl"),
    [
        ("starter-gpu", {"gpus": NO_GPU}, "no NVIDIA driver", "no NVIDIA driver"),
        ("starter-gpu", {"gpus": OLD}, "install NVIDIA's driver 580", "install NVIDIA's driver 580"),
        ("starter-gpu", {"environments": without("gpu-art")}, "vllm is 0.25.1, not ==0.22.1, trl is missing", None),
        # ART's server runs where vLLM is.
        ("starter-gpu", {"environments": without("gpu-trl")}, "make gpu-trl", "make gpu-trl"),
        ("qwen-7b", {"gpus": SMALL}, "are there; train --dry-run shows of what", "are there"),
        ("qwen-7b", {"answers": OFFLINE}, "get a network", "--set stories=FILE"),
        ("qwen-7b", {"places": FULL}, "to download, 1.0 GB are free", "make room or set RUNS_DIR"),
        ("starter", {"available_bytes": 1 * GB}, "training: about", "training: about"),
        ("starter", {"environments": without("cpu")}, "packages: vllm is", "packages: vllm is"),
    ],
)
def test_what_is_missing_is_said_with_what_to_do(
    name: str, changes: dict[str, object], art: str, trl: str | None
) -> None:
    found = verdict(profile(name), machine(**changes), ALONE)
    assert art in " | ".join(found.engines["art"])
    if trl is None:
        assert found.engines["trl"] == () and found.can_run
    else:
        assert trl in " | ".join(found.engines["trl"]) and not found.can_run
    assert verdict(profile("starter"), machine(**changes), ALONE).can_run == (
        name != "starter" and "places" not in changes
    )


def test_a_reward_model_that_is_nowhere_is_named() -> None:
    found = verdict(load_profile("qwen-0.5b"), machine(), ALONE)
    assert "there is no reward model models/reward-model" in found.engines["art"][0]
    elsewhere = ALONE.model_copy(update={"reward_model_url": "http://reward:7000"})
    here = (*machine().answers[:2], Answer("reward", "http://reward:7000", "healthy"), machine().answers[3])
    assert verdict(load_profile("qwen-0.5b"), machine(answers=here), elsewhere).can_run


def test_findings_say_who_holds_a_port_and_what_a_gpu_is_used_for() -> None:
    ports = (
        Port("prefect", 4200, "process 12 (python)"),
        Port("mlflow", 5000, "MLflow server of hn-titles up", own=True),
    )
    busy = Gpus((replace(H100, free_bytes=20 * GB),), "580.95.05", (13, 0))
    found = findings(machine(ports=ports, gpus=busy))
    amiss = [one for one in found if one.state != "ok"]
    assert [one.area for one in amiss] == ["GPU", "ports"]
    assert "nvidia-smi" in amiss[0].to_do
    assert amiss[1] == Finding(
        "ports",
        "4200 (prefect) is held by process 12 (python)",
        "note",
        "for hn-titles up: --port-prefect 0, or stop what holds it",
    )


@pytest.mark.parametrize(
    ("table", "head", "expected"),
    [
        (
            "0, NVIDIA H100 80GB HBM3, 81559, 81076, 580.95.05\n1, NVIDIA H200, 143771, 100, 580.95.05\n",
            "| NVIDIA-SMI 580.95.05    Driver Version: 580.95.05    CUDA Version: 13.0     |",
            Gpus(
                (
                    Gpu(0, "NVIDIA H100 80GB HBM3", 81559 * 2**20, 81076 * 2**20),
                    Gpu(1, "NVIDIA H200", 143771 * 2**20, 100 * 2**20),
                ),
                "580.95.05",
                (13, 0),
            ),
        ),
        ("No devices were found\n", "", Gpus((), problem="nvidia-smi shows no GPU")),
    ],
)
def test_what_nvidia_smi_prints_is_read(table: str, head: str, expected: Gpus) -> None:
    assert read_table(table, head) == expected


@pytest.mark.parametrize(
    ("wanted", "found", "state"),
    [("==5.2.0", "5.2.0", "installed"), ("<7", "7.36.2", "wrong"), ("", "1", "installed"), (">=1", None, "missing"),
     ("==2.11.*", "2.11.0+cu130", "installed")],
)  # fmt: skip
def test_a_version_is_judged_by_its_bounds(wanted: str, found: str | None, state: str) -> None:
    assert Package("one", wanted, found).state == state


def test_needs_are_those_of_pyproject_each_once() -> None:
    for extra, own in {"cpu": "trl", "gpu-art": "unsloth", "gpu-trl": "vllm"}.items():
        needed = {one.name: str(one.specifier) for one in requirements(extra)}
        assert own in needed and len(needed) == len(requirements(extra))
    art, trl = ({one.name: one for one in requirements(extra)} for extra in ("gpu-art", "gpu-trl"))
    assert art["transformers"].specifier.contains("5.2.0") and not art["transformers"].specifier.contains("5.17.0")
    # The one that vLLM's server needs and the one that Prefect needs are no common version.
    assert trl["fastapi"].specifier.contains("0.136.3") and not art["fastapi"].specifier.contains("0.136.3")
    assert "prefect" in art and "prefect" not in trl


@pytest.mark.parametrize(
    ("extra", "file"), [("gpu-art", "constraints-gpu-art.txt"), ("gpu-trl", "constraints-gpu-trl.txt")]
)
def test_the_constraints_hold_what_pyproject_asks_for(extra: str, file: str) -> None:
    root = Path(__file__).resolve().parents[2]
    lines = [line for line in (root / file).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    pinned = {name.lower().replace("_", "-"): version for name, _, version in (line.partition("==") for line in lines)}
    for one in requirements(extra):
        assert one.specifier.contains(pinned[one.name.lower().replace("_", "-")], True), one


def test_an_environment_elsewhere_is_read_without_starting_it(tmp_path: Path) -> None:
    packages = tmp_path / ".venv-gpu-trl/lib/python3.12/site-packages"
    (packages / "vllm-0.22.1.dist-info").mkdir(parents=True)
    (packages / "vllm-0.22.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.22.1\n")
    here = {one.extra: one for one in environments(tmp_path)}
    assert here["cpu"].place == "this Python" and here["gpu-art"].place is None
    vllm = next(one for one in here["gpu-trl"].packages if one.name == "vllm")
    assert vllm.state == "installed" and not here["gpu-trl"].usable
    given = {one.extra: one for one in environments(Path("/nowhere"), tmp_path / ".venv-gpu-trl/bin/python")}
    assert given["gpu-trl"].place == str(tmp_path / ".venv-gpu-trl")
    assert look_at("gpu-trl", None, None).amiss
