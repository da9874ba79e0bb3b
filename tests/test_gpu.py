"""What stands against a machine's GPUs, from what nvidia-smi prints: each refusal says what, why and what to do."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_models import need_transformers, network, write_model
from verl_stack import spec

from klreg_verl.experiment.fit import GIB, GPUS, gpu_named
from klreg_verl.experiment.settings import ModelSpec, ResourcesSpec, TrainSpec
from klreg_verl.experiment.store import run_folder
from launch import gpu, host, preflight

R1 = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
H100 = "{index}, GPU-{index}aaa-bbb, NVIDIA H100 80GB HBM3, 81559, {used}, 580.95.05, Disabled\n"
EIGHT = "".join(H100.format(index=index, used=1) for index in range(8))


STANDIN = Path(__file__).parent / "slurm" / "standin"
"""With it on the path torch calls itself a build for CUDA."""


def devices(text: str = EIGHT) -> list[gpu.Device]:
    return gpu.parse_devices(text)


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An nvidia-smi on the PATH that prints what it is given."""

    def make(gpus: str, apps: str = "", code: int = 0) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "gpus").write_text(gpus)
        (folder / "apps").write_text(apps)
        program = folder / "nvidia-smi"
        which = f'case "$1" in --query-gpu=*) cat {folder}/gpus ;; *) cat {folder}/apps ;; esac'
        program.write_text(f"#!/bin/sh\n{which}\nexit {code}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return make


@pytest.fixture
def rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What else a machine with GPUs has: torch built for CUDA, which sees all of them, a compiler, memory."""
    torch = gpu.Torch(version="2.11.0+cu130", cuda="13.0", count=8)
    monkeypatch.setattr(gpu, "torch_in", lambda environment: torch)
    monkeypatch.setattr(host, "check_compiler", lambda environment: "/usr/bin/gcc")
    monkeypatch.setattr(host, "memory_available", lambda: 500 * 10**9)


# ---------------------------------------------------------------------------------------------------- reading


def test_lines_of_nvidia_smi_become_devices():
    first = devices()[0]
    assert (first.index, first.uuid, first.name) == (0, "GPU-0aaa-bbb", "NVIDIA H100 80GB HBM3")
    assert (first.total_bytes, first.used_bytes, first.driver) == (81559 * 1024**2, 1024**2, "580.95.05")
    assert len(devices()) == 8 and devices("\n") == []


LOST = "0, GPU-0aaa-bbb, NVIDIA H100 80GB HBM3, [N/A], [N/A], 580.95.05, [N/A]\n" + H100.format(index=1, used=1)
SLICED = H100.format(index=0, used=1).replace("Disabled", "Enabled") + H100.format(index=1, used=1)


def test_a_gpu_in_mig_mode_or_out_of_order_is_refused_and_the_advice_works(nvidia_smi):
    nvidia_smi(LOST)
    with pytest.raises(
        ValueError, match=r"GPU 0 is out of order or .*'0, GPU-0aaa-bbb.*Choose .*VISIBLE_DEVICES=1, or"
    ):
        gpu.here({})
    assert [one.index for one in gpu.here({"CUDA_VISIBLE_DEVICES": "1"})[0]] == [1]
    nvidia_smi(SLICED)
    with pytest.raises(
        ValueError, match="GPU 0 is in MIG mode, .*need whole GPUs. Choose .*CUDA_VISIBLE_DEVICES=1, or"
    ):
        gpu.here({})
    assert [one.index for one in gpu.here({"CUDA_VISIBLE_DEVICES": "1"})[0]] == [1]


def test_a_line_that_is_no_gpus_counts_as_one_that_nobody_can_choose(nvidia_smi):
    nvidia_smi("Unable to determine the device handle for GPU0: Unknown Error\n" + H100.format(index=1, used=1))
    with pytest.raises(
        ValueError, match="A GPU is out of order .*Unable to determine.*CUDA_VISIBLE_DEVICES=1, or have"
    ):
        gpu.here({})
    assert len(gpu.here({"CUDA_VISIBLE_DEVICES": "1"})[0]) == 1
    with pytest.raises(ValueError, match="there is no GPU -1. This machine has 1"):
        gpu.here({"CUDA_VISIBLE_DEVICES": "-1"})


def test_no_visible_gpu_is_said_with_what_hides_them(nvidia_smi):
    nvidia_smi(EIGHT)
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES='' hides all 8 GPUs of this machine. Unset it"):
        gpu.here({"CUDA_VISIBLE_DEVICES": ""})
    nvidia_smi("")
    with pytest.raises(ValueError, match="nvidia-smi lists no GPU on this machine"):
        gpu.here({})


def test_processes_are_read_and_those_of_other_containers_left_out():
    found = gpu.parse_apps("GPU-0aaa-bbb, 4711, /usr/bin/python3, 40000\nGPU-1aaa-bbb, [N/A], [Not Found], [N/A]\n")
    assert found == [gpu.App(uuid="GPU-0aaa-bbb", pid=4711, name="/usr/bin/python3")]


def test_what_the_program_prints_is_what_is_read(nvidia_smi):
    nvidia_smi(EIGHT, "GPU-3aaa-bbb, 99, python, 1000\n")
    found, apps = gpu.here()
    assert (len(found), apps[0].pid) == (8, 99)


def test_no_driver_is_said_with_the_way_to_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ValueError, match="nvidia-smi is not there.*no NVIDIA driver.*580.65 or newer.*VERL_PLATFORM=cpu"
    ):
        gpu.query()


def test_a_driver_that_does_not_answer_is_said(nvidia_smi):
    nvidia_smi("Failed to initialize NVML: Driver/library version mismatch\n", code=18)
    with pytest.raises(ValueError, match=r"nvidia-smi failed \(Failed to initialize NVML: Driver/library version mism"):
        gpu.query()


# ---------------------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize(
    ("said", "indices"), [("2,0", [2, 0]), ("GPU-5aaa", [5]), ("", []), (" 1 , 3 ", [1, 3]), (None, list(range(8)))]
)
def test_only_what_cuda_may_see_counts(said: str | None, indices: list[int]):
    environment = {} if said is None else {"CUDA_VISIBLE_DEVICES": said}
    assert [one.index for one in gpu.visible(devices(), environment)] == indices


def test_a_gpu_that_is_not_there_and_a_slice_are_refused():
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=9: there is no GPU 9. This machine has 0, 1, 2"):
        gpu.visible(devices(), {"CUDA_VISIBLE_DEVICES": "9"})
    with pytest.raises(ValueError, match="names a MIG slice: verl and NCCL need whole GPUs"):
        gpu.visible(devices(), {"CUDA_VISIBLE_DEVICES": "MIG-12ab"})


@pytest.mark.parametrize("said", ["0,0", "0, GPU-0aaa"])
def test_a_gpu_named_twice_is_refused_since_cuda_then_shows_none(said: str):
    with pytest.raises(ValueError, match=f"CUDA_VISIBLE_DEVICES={said} names GPU 0 twice, .*none at all"):
        gpu.visible(devices(), {"CUDA_VISIBLE_DEVICES": said})


def test_numbers_by_speed_are_refused_where_gpus_differ():
    mixed = devices(H100.format(index=0, used=0) + "1, GPU-1aaa, NVIDIA A40, 46068, 0, 580.95.05, [N/A]\n")
    fastest = {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    with pytest.raises(
        ValueError, match="CUDA_DEVICE_ORDER=FASTEST_FIRST .*VISIBLE_DEVICES=1 would be others.*PCI_BUS_ID"
    ):
        gpu.visible(mixed, {**fastest, "CUDA_VISIBLE_DEVICES": "1"})
    for name in ("1", "GPU-1aaa"):  # by place, as runs are told to count
        order = {} if name == "1" else fastest
        assert [one.index for one in gpu.visible(mixed, {**order, "CUDA_VISIBLE_DEVICES": name})] == [1]
    assert len(gpu.visible(devices(), {**fastest, "CUDA_VISIBLE_DEVICES": "1,2"})) == 2
    assert gpu.ENVIRONMENT["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_the_beginning_of_several_uuids_is_refused():
    with pytest.raises(ValueError, match=r"GPU- is the beginning of several UUIDs \(GPUs 0, 1, 2, .*shows none"):
        gpu.visible(devices(), {"CUDA_VISIBLE_DEVICES": "GPU-"})


# ---------------------------------------------------------------------------------------------------- judging


def test_eight_free_gpus_pass_and_are_named():
    assert gpu.check_devices(devices(), [], 8) == "8 x NVIDIA H100 80GB HBM3, 80 GiB each, driver 580.95.05"


def test_too_few_are_refused():
    with pytest.raises(
        ValueError, match="2 GPUs are visible, the run takes 8 .*name more in CUDA_VISIBLE_DEVICES.*gpus_per_node=2"
    ):
        gpu.check_devices(devices()[:2], [], 8)
    with pytest.raises(ValueError, match="No GPU is visible, the run takes 1"):
        gpu.check_devices([], [], 1)


@pytest.mark.parametrize("driver", ["550.144.03", "575.57.08", "580.60.01", "[N/A]"])
def test_an_old_driver_is_refused(driver: str):
    with pytest.raises(ValueError, match=r"The NVIDIA driver is .*CUDA 13 needs 580.65 or newer.*no container"):
        gpu.check_devices(devices(EIGHT.replace("580.95.05", driver)), [], 1)


@pytest.mark.parametrize("driver", ["580.65.06", "581.15", "590.10.01"])
def test_new_enough_drivers_pass(driver: str):
    assert driver in gpu.check_devices(devices(EIGHT.replace("580.95.05", driver)), [], 1)


def test_mixed_kinds_are_refused_by_name_and_by_size():
    mixed = H100.format(index=0, used=0) + "1, GPU-1aaa-bbb, NVIDIA A100-SXM4-40GB, 40960, 0, 580.95.05, [N/A]\n"
    with pytest.raises(ValueError, match=r"of 2 kinds \(0: NVIDIA H100 80GB HBM3 \(80 GiB\), 1: NVIDIA A100.*CUDA_VIS"):
        gpu.check_devices(devices(mixed), [], 1)
    sizes = "0, GPU-0, NVIDIA A100, 40960, 0, 580.95.05, [N/A]\n1, GPU-1, NVIDIA A100, 81920, 0, 580.95.05, [N/A]\n"
    with pytest.raises(ValueError, match="of 2 kinds"):
        gpu.check_devices(devices(sizes), [], 1)


def test_a_small_gpu_is_refused_before_any_model_is_looked_at():
    small = "0, GPU-0, NVIDIA GeForce RTX 3080, 10240, 0, 580.95.05, [N/A]\n"
    with pytest.raises(ValueError, match=r"GPU 0 \(NVIDIA GeForce RTX 3080\) has 10 GiB; .* at least 14 GiB"):
        gpu.check_devices(devices(small), [], 1)


def test_a_gpu_in_use_is_refused_with_who_and_which_are_free():
    text = H100.format(index=0, used=40_960) + H100.format(index=1, used=4) + H100.format(index=2, used=4)
    apps = [gpu.App(uuid="GPU-0aaa-bbb", pid=4711, name="python3")]
    with pytest.raises(ValueError, match=r"GPU 0 40.0 GiB by python3 \(pid 4711\)\..*CUDA_VISIBLE_DEVICES=1,2\."):
        gpu.check_devices(devices(text), apps, 2)
    with pytest.raises(ValueError, match=r"In use already: GPU 0 40.0 GiB\..*Wait for it"):
        gpu.check_devices(devices(text), [], 3)


def test_a_desktops_share_is_not_in_use():
    assert gpu.check_devices(devices(H100.format(index=0, used=1500)), [], 1).startswith("1 x NVIDIA H100")


# ---------------------------------------------------------------------------------------------------- preflight


def run(**sections: object):
    train = TrainSpec(prompts_per_step=128, max_prompt_tokens=1024, max_response_tokens=8192, micro_batch=1)
    given = {"model": ModelSpec(path=R1), "train": train, "resources": ResourcesSpec(gpus_per_node=8)}
    return spec(**(given | sections))


WITHOUT = dict(gpu.WITHOUT_FLASH)


def test_preflight_looks_at_the_gpus_and_the_fit(nvidia_smi, rest, tmp_path: Path):
    nvidia_smi(EIGHT)
    found = {one.what: one.detail for one in preflight.check_gpus([run(verl=WITHOUT)], tmp_path)}
    assert found["gpus"].startswith("8 x NVIDIA H100")
    assert found["fit"].startswith("about ") and found["fit"].endswith("of 80 GiB at the peak, by arithmetic")


def test_preflight_refuses_what_cannot_fit_before_anything_starts(nvidia_smi, rest, tmp_path: Path):
    nvidia_smi("0, GPU-0, NVIDIA GeForce RTX 4090, 24564, 0, 580.95.05, [N/A]\n")
    with pytest.raises(ValueError, match="does not fit 1 GPU. training: .* of 24.0 GiB can be used on RTX-4090"):
        preflight.check_gpus([run(resources=ResourcesSpec(), verl=WITHOUT)], tmp_path)


def test_a_gpu_that_no_table_has_is_judged_by_its_memory_alone(nvidia_smi, rest, tmp_path: Path):
    alone = run(resources=ResourcesSpec(), verl=WITHOUT)
    nvidia_smi("0, GPU-0, NVIDIA Z9000, 200000, 0, 580.95.05, [N/A]\n")
    found = {one.what: one.detail for one in preflight.check_gpus([alone], tmp_path)}
    assert "of 195 GiB at the peak, by arithmetic; NVIDIA Z9000 is in no table, so what a step takes" in found["fit"]
    nvidia_smi("0, GPU-0, NVIDIA A40, 24564, 0, 580.95.05, [N/A]\n")
    with pytest.raises(ValueError, match="does not fit 1 GPU. training: .* of 24.0 GiB can be used on NVIDIA A40"):
        preflight.check_gpus([alone], tmp_path)


def test_preflight_counts_the_hosts_memory_with_what_the_models_take_there(nvidia_smi, rest, tmp_path, monkeypatch):
    """8 GB, 4 for each of 7 more workers, and what fit says."""
    nvidia_smi(EIGHT)
    one = run(verl=WITHOUT)
    models = gpu.fit_of([one], tmp_path, gpu_named("H100")).runs[one.run_id].host_bytes / 1e9
    found = {each.what: each.detail for each in preflight.check_gpus([one], tmp_path)}
    assert found["memory"].startswith(f"500 GB available, about {8 + 7 * 4 + models:.0f} GB needed, {models:.1f} GB of")
    monkeypatch.setattr(host, "memory_available", lambda: int((35.9 + models) * 10**9))
    with pytest.raises(ValueError, match=r"GB of memory .*8 worker\(s\) takes about .* ask Slurm for .*memory_gb"):
        preflight.check_gpus([one], tmp_path)
    monkeypatch.setattr(host, "memory_available", lambda: int((36.1 + models) * 10**9))
    preflight.check_gpus([one], tmp_path)


# ---------------------------------------------------------------------------------------------------- torch


def test_torch_is_asked_in_a_process_with_the_runs_variables():
    """This environment's own torch, then as the Slurm tests' study shows it."""
    torch = pytest.importorskip("torch")
    asked = gpu.torch_in(os.environ)
    assert (asked.version, asked.cuda) == (torch.__version__, torch.version.cuda)
    shown = gpu.torch_in({**os.environ, "PYTHONPATH": str(STANDIN), "CUDA_VISIBLE_DEVICES": "3,5"})
    assert (shown.cuda, shown.count) == ("13.0", 2)


def test_a_torch_that_does_not_import_is_said(tmp_path: Path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    with pytest.raises(ValueError, match="does not answer .*libcudart.so.13.*setup_gpu.sh"):
        gpu.torch_in({**os.environ, "PYTHONPATH": str(tmp_path)})


def test_a_cpu_build_and_gpus_that_torch_cannot_use_are_refused():
    with pytest.raises(ValueError, match=r"torch 2.13.0\+cpu in .* is a CPU build.*launch/env/setup_gpu.sh makes"):
        gpu.check_torch(gpu.Torch(version="2.13.0+cpu", cuda=None, count=0), 1)
    said = gpu._complaint(
        "x.py:1: UserWarning: CUDA initialization: Error 802 (Triggered internally at y.cpp)\n  return"
    )
    none = gpu.Torch(version="2.11.0", cuda="13.0", count=0, said=said)
    with pytest.raises(
        ValueError, match=r"shows 8 visible .* can use 0 \(CUDA initialization: Error 802\).*fabricmanager"
    ):
        gpu.check_torch(none, 8)
    assert gpu.check_torch(gpu.Torch(version="2.11.0", cuda="13.0", count=8), 8) == "torch 2.11.0, CUDA 13.0"


def test_preflight_refuses_a_torch_that_sees_fewer_gpus(nvidia_smi, rest, tmp_path: Path, monkeypatch):
    nvidia_smi(EIGHT)
    monkeypatch.setattr(gpu, "torch_in", lambda environment: gpu.Torch(version="2.11.0", cuda="13.0", count=7))
    with pytest.raises(ValueError, match="shows 8 visible .* can use 7"):
        preflight.check_gpus([run(verl=WITHOUT)], tmp_path)


# ---------------------------------------------------------------------------------------------------- attention


def test_padded_batches_need_a_micro_batch_of_rows(monkeypatch: pytest.MonkeyPatch):
    packed = TrainSpec(prompts_per_step=8, max_prompt_tokens=64, max_response_tokens=64)
    for installed in (None, SimpleNamespace()):
        monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name, found=installed: found)
        with pytest.raises(
            ValueError, match="use_remove_padding is false and train.micro_batch is not set.*Set train.m"
        ):
            gpu.check_attention([run(train=packed, verl=WITHOUT)])
    assert gpu.check_attention([run(train=packed)]) == "flash-attn"


def test_a_run_without_flash_attn_must_say_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="flash-attn is not installed.*attn_implementation: sdpa.*remove_padding: false"
    ):
        gpu.check_attention([run()])
    assert gpu.check_attention([run(verl=WITHOUT)]) == "torch's sdpa, padded batches"
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: SimpleNamespace())
    assert gpu.check_attention([run()]) == "flash-attn"


def test_measured_steps_count_only_where_they_were_made_on_such_a_gpu(tmp_path: Path):
    ours, other, cpu = (run(seed=seed) for seed in (1, 2, 3))
    cards = {
        1: ("cuda", ["NVIDIA H100 80GB HBM3, 81559 MiB, 580.95.05"]),
        2: ("cuda", ["NVIDIA H200, 143771 MiB, 580"]),
    }
    for one in (ours, other, cpu):
        folder = run_folder(one, tmp_path)
        folder.create(one)
        for step in (1, 2, 3):
            folder.append_metrics(step, {"time/step_s": 10.0})
        platform, names = cards.get(one.seed, ("cpu", []))
        (folder.path / "provenance.json").write_text(json.dumps({"platform": platform, "host": {"gpus": names}}))
    found = gpu.measured([ours, other, cpu], tmp_path, GPUS["H100"])
    assert [(one.spec.seed, one.seconds) for one in found] == [(1, 10.0)]
    card = {"platform": "cuda", "host": {"gpus": ["NVIDIA A100-SXM4-40GB, 40536 MiB, 580"]}}
    (run_folder(cpu, tmp_path).path / "provenance.json").write_text(json.dumps(card))
    assert [one.spec.seed for one in gpu.measured([cpu], tmp_path, gpu_named("a100-40gb"))] == [3]


def test_the_kind_of_a_device_has_its_own_memory():
    kind = gpu.kind_of(devices())
    assert kind == gpu_named("H100") and kind.memory_bytes / GIB == pytest.approx(79.6, abs=0.1)
    assert gpu.kind_of([]) is None


# ---------------------------------------------------------------------------------------------------- the Hub


def hub(tmp_path: Path, code: str) -> str:
    """What check_hub says, in a process of its own: huggingface_hub reads its variables when it is imported."""
    ask = f"print(gpu.check_hub({R1!r}, None, os.environ))"
    program = f"import os\nfrom launch import gpu\ntry: {ask}\nexcept ValueError as error: print(error)"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", **json.loads(code)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_model_that_is_nowhere_is_refused_offline_and_where_the_hub_does_not_answer(tmp_path: Path):
    said = hub(tmp_path, '{"HF_HUB_OFFLINE": "1"}')
    assert "is not in the Hugging Face cache, and HF_HUB_OFFLINE forbids" in said and f"hf download {R1}" in said
    said = hub(tmp_path, "{}")
    assert "the Hub does not answer (" in said and "with the same HF_HOME" in said


def test_a_cached_model_needs_no_hub_but_to_be_whole(tmp_path: Path):
    need_transformers()
    snapshot = tmp_path / "hub" / f"models--{R1.replace('/', '--')}" / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("ab" * 20)
    offline = '{"HF_HUB_OFFLINE": "1"}'
    assert "in the Hugging Face cache without its weights" in hub(tmp_path, offline)
    write_model(snapshot, network(0), template="{{ messages[0]['content'] }}")
    assert "in the Hugging Face cache (abababababab)" in hub(tmp_path, offline)
    index = snapshot / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    said = hub(tmp_path, offline)
    assert "HF_HUB_OFFLINE forbids to fetch what is missing" in said and "names: model-2.safetensors" in said
    assert f"`hf download {R1}` where there is a network" in said
    index.unlink()
    for file in snapshot.glob("tokenizer*"):
        file.unlink()
    assert "HF_HUB_OFFLINE forbids to fetch what is missing" in hub(tmp_path, offline)
