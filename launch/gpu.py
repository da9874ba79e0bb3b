"""What is known about a machine's GPUs before anything starts: found by nvidia-smi, compared with what a run needs.

Everything is told as text from nvidia-smi, so that each refusal can be tested where there is no GPU.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from klreg_verl.experiment import architecture, estimate, fit
from klreg_verl.experiment.architecture import Architecture
from klreg_verl.experiment.fit import GIB, GPU, Measured, RecipeFit
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.settings import SMOLLM2
from klreg_verl.experiment.store import run_folder

DRIVER = (580, 65)
"""The oldest Linux driver for CUDA 13, which launch/env/gpu.lock's wheels are built with (CUDA 13.0 release notes)."""
SMALLEST_BYTES = 14 * GIB
"""vLLM, trainer and their CUDA contexts need so much with the smallest models."""
BUSY_BYTES = 2 * GIB
"""More than an idle driver and a desktop take."""
DEVICES_QUERY = "index,uuid,name,memory.total,memory.used,driver_version,mig.mode.current"
APPS_QUERY = "gpu_uuid,pid,process_name,used_memory"
ENVIRONMENT = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "VLLM_NO_USAGE_STATS": "1"}
"""Of every process that a run starts on GPUs, unless it says otherwise: CUDA_VISIBLE_DEVICES is checked by nvidia-smi's
numbers, which go by place, and CUDA's own begin with the fastest; nothing is sent to vLLM's makers."""
_SECONDS, _TORCH_SECONDS = 30, 300


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU as nvidia-smi tells it."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    used_bytes: int
    driver: str
    problem: str = ""
    """Why it cannot be used whatever the run, in words."""


@dataclass(frozen=True, kw_only=True)
class App:
    """A process that computes on a GPU."""

    uuid: str
    pid: int
    name: str


# ---------------------------------------------------------------------------------------------------- asking


def query() -> tuple[list[Device], list[App]]:
    """The machine's GPUs, and who computes on them.

    Raises:
        ValueError: there is no driver, or it does not answer.
    """
    return parse_devices(_ask("--query-gpu", DEVICES_QUERY)), parse_apps(_ask("--query-compute-apps", APPS_QUERY))


def _ask(what: str, fields: str) -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        raise ValueError(
            "nvidia-smi is not there, so this machine has no NVIDIA driver. Install one for CUDA 13 "
            f"({_version(DRIVER)} or newer), start where there is one, or train on the CPU with VERL_PLATFORM=cpu."
        )
    command = [program, f"{what}={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"nvidia-smi did not answer for {_SECONDS} s: a GPU hangs. Have the node looked at.") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()[:1] or ["nothing"]
        raise ValueError(
            f"nvidia-smi failed ({said[0]}). The driver is much older than {_version(DRIVER)}, or its module is not "
            "loaded or does not fit its library: reboot after a driver update, or have the node looked at."
        )
    return done.stdout


def parse_devices(text: str) -> list[Device]:
    """`index, uuid, name, MiB, MiB, driver, MIG mode` per line; one that cannot be read or used says why."""
    rows = csv.reader(text.splitlines(), skipinitialspace=True)
    return [_device(row) for row in rows if row]


def _device(row: list[str]) -> Device:
    try:
        index, uuid, name, total, used, driver, mig = row
        mib = int(total) * 1024**2, int(used) * 1024**2
        device = Device(
            index=int(index), uuid=uuid, name=name, total_bytes=mib[0], used_bytes=mib[1], driver=driver.strip()
        )
    except ValueError:
        return _unreadable(row)
    sliced = "is in MIG mode, of which CUDA would give one slice: verl and NCCL need whole GPUs"
    return replace(device, problem=sliced) if mig == "Enabled" else device


def _unreadable(row: list[str]) -> Device:
    """Whatever can be told of it; -1: its number cannot."""
    index, uuid, name = (row + ["", ""])[:3]
    said = f"is out of order or in MIG mode: nvidia-smi says {', '.join(row)!r} about it, which cannot be read"
    number = int(index) if index.isdecimal() else -1
    return Device(index=number, uuid=uuid, name=name, total_bytes=0, used_bytes=0, driver="", problem=said)


def parse_apps(text: str) -> list[App]:
    """`uuid, pid, name, MiB` per line; lines about processes of other containers, without a pid, are left out."""
    rows = csv.reader(text.splitlines(), skipinitialspace=True)
    return [App(uuid=row[0], pid=int(row[1]), name=row[2]) for row in rows if len(row) >= 3 and row[1].isdecimal()]


def visible(devices: Sequence[Device], environment: Mapping[str, str]) -> list[Device]:
    """Those that CUDA_VISIBLE_DEVICES leaves, in its order. Raises ValueError where CUDA would see others, or none."""
    said = environment.get("CUDA_VISIBLE_DEVICES")
    if said is None:
        return list(devices)
    names = [part.strip() for part in said.split(",") if part.strip()]
    _check_order(devices, names, environment.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID"))
    chosen = [_named(name, devices, said) for name in names]
    twice = sorted({one.index for one in chosen if chosen.count(one) > 1})
    if twice:
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={said} names GPU {twice[0]} twice, and CUDA then shows none at all. Name each once."
        )
    return chosen


def _check_order(devices: Sequence[Device], names: Sequence[str], order: str) -> None:
    """Numbers mean the same to CUDA and nvidia-smi; where all GPUs are alike it does not matter. Raises ValueError."""
    if order != "PCI_BUS_ID" and len({one.name for one in devices}) > 1 and any(map(str.isdecimal, names)):
        raise ValueError(
            f"CUDA_DEVICE_ORDER={order} lets CUDA number the fastest GPU first, and this machine has several kinds: "
            f"CUDA_VISIBLE_DEVICES={','.join(names)} would be others than nvidia-smi's. Set "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID, or name GPUs by their UUIDs (nvidia-smi -L)."
        )


def _named(name: str, devices: Sequence[Device], said: str) -> Device:
    """The GPU of one part of CUDA_VISIBLE_DEVICES: a number, or the beginning of a UUID. Raises ValueError."""
    if name.startswith("MIG-"):
        raise ValueError(f"CUDA_VISIBLE_DEVICES={said} names a MIG slice: verl and NCCL need whole GPUs. Ask for one.")
    numbered = [one for one in devices if one.index >= 0]
    found = [one for one in numbered if name == str(one.index) or (name[:4] == "GPU-" and one.uuid.startswith(name))]
    if not found:
        known = ", ".join(str(one.index) for one in numbered) or "none"
        raise ValueError(f"CUDA_VISIBLE_DEVICES={said}: there is no GPU {name}. This machine has {known}.")
    if len(found) > 1:
        fitting = ", ".join(str(one.index) for one in found)
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={said}: {name} is the beginning of several UUIDs (GPUs {fitting}), and CUDA then "
            "shows none. Give more of it, or a number."
        )
    return found[0]


def is_useful(device: Device) -> bool:
    """Whether some run could use it: whole, large enough, with a driver that knows CUDA 13."""
    return not device.problem and device.total_bytes >= SMALLEST_BYTES and _numbers(device.driver) >= DRIVER


def _check_usable(devices: Sequence[Device], chosen: Sequence[Device], environment: Mapping[str, str]) -> None:
    """There are visible GPUs, and each can be read and is whole. Raises ValueError."""
    if not devices:
        raise ValueError("nvidia-smi lists no GPU on this machine. Start where there are some, or ask for them.")
    if not chosen:
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={environment.get('CUDA_VISIBLE_DEVICES')!r} hides all {len(devices)} GPUs of this "
            "machine. Unset it, or name those to use."
        )
    bad = next((one for one in chosen if one.problem), None)
    if bad is not None:
        good = ",".join(str(one.index) for one in chosen if not one.problem)
        way = f"Choose others with CUDA_VISIBLE_DEVICES={good}, or have" if good else "Have"
        label = "A GPU" if bad.index < 0 else f"GPU {bad.index}"
        raise ValueError(f"{label} {bad.problem}. {way} the node looked at.")


# ---------------------------------------------------------------------------------------------------- torch


@dataclass(frozen=True, kw_only=True)
class Torch:
    """torch as the processes of a run find it."""

    version: str
    cuda: str | None
    """That it was built for; None: a build without CUDA."""
    count: int
    """GPUs that it can use."""
    said: str = ""
    """What it complained of."""


_ASK_TORCH = """\
import json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(json.dumps({"version": str(torch.__version__), "cuda": torch.version.cuda, "count": count}))"""


def torch_in(environment: Mapping[str, str]) -> Torch:
    """torch in a process of its own, with the variables of a run's: asked here, it could keep a GPU's memory.

    Raises:
        ValueError: it cannot be imported.
    """
    command = [sys.executable, "-P", "-c", _ASK_TORCH]
    given = {**ENVIRONMENT, **environment}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=given, timeout=_TORCH_SECONDS)
        values = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
        said = done.stderr.strip().splitlines()[-1:] if not isinstance(error, subprocess.TimeoutExpired) else []
        raise ValueError(
            f"torch in {sys.prefix} does not answer ({''.join(said) or f'{_TORCH_SECONDS} s'}), so nothing can be "
            "trained with it. launch/env/setup_gpu.sh makes an environment for GPUs, `make setup` the CPU's."
        ) from None
    return Torch(**values, said=_complaint(done.stderr))


def _complaint(text: str) -> str:
    """Of torch's warning, what it says of CUDA."""
    found = re.search(r"UserWarning: (.*?)(?: \(Triggered internally|$)", text, re.MULTILINE)
    return f" ({found[1]})" if found else ""


def check_build(torch: Torch) -> None:
    """torch was built for CUDA. Raises ValueError."""
    if torch.cuda is None:
        raise ValueError(
            f"torch {torch.version} in {sys.prefix} is a CPU build, which uses no GPU. launch/env/setup_gpu.sh makes "
            "the environment for GPUs (.venv-gpu); start with its klreg."
        )


def check_torch(torch: Torch, needed: int) -> str:
    """torch can use as many GPUs as nvidia-smi shows; returns it in words. Raises ValueError."""
    check_build(torch)
    if torch.count < needed:
        raise ValueError(
            f"nvidia-smi shows {needed} visible GPU(s) and torch {torch.version}, built for CUDA {torch.cuda}, can use "
            f"{torch.count}{torch.said}. Is /dev/nvidia-uvm there, does nvidia-fabricmanager run (GPUs with NVSwitch), "
            "and was a container started with its GPUs (--nv, --gpus all)? Else have the node looked at."
        )
    return f"torch {torch.version}, CUDA {torch.cuda}"


# ---------------------------------------------------------------------------------------------------- judging


def check_devices(devices: Sequence[Device], apps: Sequence[App], needed: int) -> str:
    """The GPUs are enough, alike, large enough, free, and their driver is new enough.

    Args:
        devices: the visible ones.
        apps: who computes on the machine's GPUs.
        needed: GPUs that a run takes on this node.

    Returns:
        What was found, in words.

    Raises:
        ValueError: with what was found, why it cannot work, and what to do.
    """
    if len(devices) < needed:
        raise ValueError(
            f"{_count(len(devices))} visible, the run takes {needed} on a node (resources.gpus_per_node). Ask for "
            f"more, name more in CUDA_VISIBLE_DEVICES, or set resources.gpus_per_node={max(1, len(devices))}."
        )
    _check_driver(devices[0].driver)
    _check_alike(devices)
    _check_size(devices)
    _check_free(devices, apps, needed)
    gib = devices[0].total_bytes / GIB
    return f"{len(devices)} x {devices[0].name}, {gib:.0f} GiB each, driver {devices[0].driver}"


def _numbers(driver: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", driver)[:2]))


def _check_driver(text: str) -> None:
    if _numbers(text) < DRIVER:
        raise ValueError(
            f"The NVIDIA driver is {text}, the environment's CUDA 13 needs {_version(DRIVER)} or newer: torch would "
            "see no GPU. Update the driver; no container and no Python package brings one."
        )


def _check_alike(devices: Sequence[Device]) -> None:
    kinds = {(one.name, round(one.total_bytes / GIB)): one for one in devices}
    if len(kinds) > 1:
        listed = ", ".join(f"{one.index}: {one.name} ({one.total_bytes / GIB:.0f} GiB)" for one in devices)
        raise ValueError(
            f"The visible GPUs are of {len(kinds)} kinds ({listed}). FSDP and vLLM share the work equally, so the "
            "smallest would overflow and the slowest would hold up all. Choose alike ones with CUDA_VISIBLE_DEVICES."
        )


def _check_size(devices: Sequence[Device]) -> None:
    smallest = min(devices, key=lambda one: one.total_bytes)
    if smallest.total_bytes < SMALLEST_BYTES:
        raise ValueError(
            f"GPU {smallest.index} ({smallest.name}) has {smallest.total_bytes / GIB:.0f} GiB; trainer and vLLM on one "
            f"GPU need at least {SMALLEST_BYTES / GIB:.0f} GiB with any model. Use a larger one, or VERL_PLATFORM=cpu."
        )


def _check_free(devices: Sequence[Device], apps: Sequence[App], needed: int) -> None:
    busy = [one for one in devices if one.used_bytes > BUSY_BYTES]
    if not busy:
        return
    told = "; ".join(f"GPU {one.index} {one.used_bytes / GIB:.1f} GiB{_by(one, apps)}" for one in busy)
    free = [str(one.index) for one in devices if one not in busy]
    way = (
        f"Free ones are enough: CUDA_VISIBLE_DEVICES={','.join(free)}."
        if len(free) >= needed
        else "Wait for it, stop it if it is yours, or ask for other GPUs."
    )
    raise ValueError(f"In use already: {told}. vLLM takes its share of a whole GPU and would find it missing. {way}")


def _by(device: Device, apps: Sequence[App]) -> str:
    mine = [f"{app.name} (pid {app.pid})" for app in apps if app.uuid == device.uuid]
    return f" by {', '.join(mine)}" if mine else ""


def _count(number: int) -> str:
    return "No GPU is" if number == 0 else "1 GPU is" if number == 1 else f"{number} GPUs are"


def _version(parts: Sequence[int]) -> str:
    return ".".join(map(str, parts))


def check_attention(specs: Sequence[RunSpec]) -> str:
    """flash-attn is there, or the recipe says how to do without. Raises ValueError.

    verl takes flash_attention_2 and packs batches without padding unless it is told otherwise.
    """
    check_padding(specs)
    if importlib.util.find_spec("flash_attn") is not None:
        return "flash-attn"
    told = all(spec.verl.get(key) == value for spec in specs for key, value in WITHOUT_FLASH.items())
    if not told:
        block = ", ".join(f"{key}: {str(value).lower()}" for key, value in WITHOUT_FLASH.items())
        raise ValueError(
            "flash-attn is not installed, and verl would look for it when the model is loaded. Install its wheel "
            f"(launch/env/setup_gpu.sh --flash-attn WHEEL), or let the recipe do without: verl: {{{block}}}; and set "
            "train.micro_batch, since batches are then padded."
        )
    return "torch's sdpa, padded batches"


def check_padding(specs: Sequence[RunSpec]) -> None:
    """Padded batches have micro-batches of a fixed number of rows. Raises ValueError."""
    for spec in specs:
        if spec.verl.get(PACKED, True) is False and spec.train.micro_batch is None:
            raise ValueError(
                f"{spec.run_id}: {PACKED} is false and train.micro_batch is not set. verl then fills a micro-batch by "
                "real tokens and pads each row to the longest, so one long response among many short ones takes "
                "memory that no limit holds. Set train.micro_batch: responses of full length that fit at a time."
            )


PACKED = "actor_rollout_ref.model.use_remove_padding"
WITHOUT_FLASH = {
    "actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
    PACKED: False,
}
"""verl's keys of a run without flash-attn."""


# ---------------------------------------------------------------------------------------------------- fit


def model_of(spec: RunSpec) -> Architecture:
    """The architecture of a run's model, from its files where they are here. Raises ValueError."""
    if spec.model.path == "tiny":
        return tiny(spec.model.options)
    if spec.model.path == SMOLLM2:
        return architecture.SMOLLM2_135M
    return architecture.of(spec.model.path, _folder(spec))


def tiny(options: Mapping[str, Any]) -> Architecture:
    """The model that data_prep/tiny_model.py makes, by its options; its packages need not be here."""
    hidden, heads = options.get("hidden_size", 128), options.get("heads", 4)
    return Architecture(
        name="tiny",
        layers=options.get("layers", 3),
        hidden=hidden,
        intermediate=4 * hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocabulary=261,
        tied=True,
        qkv_bias=True,
        qk_norm=False,
        source="data_prep/tiny_model.py",
    )


def _folder(spec: RunSpec) -> Path | None:
    """The model's folder, or its snapshot in the Hugging Face cache; None where neither is here."""
    if Path(spec.model.path).is_absolute():
        return Path(spec.model.path)
    return cached(spec.model.path, spec.model.revision)


def cached(name: str, revision: str | None) -> Path | None:
    """The snapshot of a Hugging Face id in the local cache, if its config is there."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        path = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(path).parent if isinstance(path, str) else None


def fit_of(specs: Sequence[RunSpec], runs_dir: Path, gpu: GPU, per_node: int = 8) -> RecipeFit:
    """fit.fit_all with models from their files and times from the runs that are there."""
    return fit.fit_all(specs, gpu, model_of, measured(specs, runs_dir, gpu), per_node)


def measured(specs: Sequence[RunSpec], runs_dir: Path, gpu: GPU) -> list[Measured]:
    """Runs of the recipe that have done steps on such GPUs, as their cards say."""
    found = []
    for spec in specs:
        folder = run_folder(spec, runs_dir)
        seconds = estimate.step_seconds(folder)
        if seconds is not None and _ran_on(folder.path / "provenance.json", gpu):
            found.append(Measured(spec=spec, seconds=seconds))
    return found


def _ran_on(card: Path, gpu: GPU) -> bool:
    """Whether the run's card names such a GPU; a run on a CPU says nothing about one."""
    try:
        values = json.loads(card.read_text())
        if values.get("platform") != "cuda":
            return False
        name, memory, *_ = values["host"]["gpus"][0].split(",")
        mib = int(memory.strip().split()[0])
        return fit.gpu_named(name.strip(), mib * 1024**2).name == gpu.name
    except (OSError, ValueError, KeyError, IndexError):
        return False


def here(environment: Mapping[str, str] | None = None) -> tuple[list[Device], list[App]]:
    """The visible GPUs of this machine. Raises ValueError where there are none, or one that cannot be used."""
    environment = os.environ if environment is None else environment
    devices, apps = query()
    chosen = visible(devices, environment)
    _check_usable(devices, chosen, environment)
    return chosen, apps


def by_memory(device: Device) -> GPU:
    """A kind that no table has: whether a run fits is known, times are not, and come out as nothing."""
    return GPU(name=device.name, memory_bytes=device.total_bytes, bandwidth=math.inf, flops=math.inf)


def kind_of(devices: Sequence[Device]) -> GPU | None:
    """The data sheet of the first device, with its own memory; None where it is not in the table."""
    try:
        return fit.gpu_named(devices[0].name, devices[0].total_bytes)
    except (ValueError, IndexError):
        return None


# ---------------------------------------------------------------------------------------------------- the Hub


def check_hub(name: str, revision: str | None, environment: Mapping[str, str]) -> str:
    """The model is in the Hugging Face cache, or the Hub has it. Raises ValueError."""
    fetch = f"`hf download {name}{f' --revision {revision}' if revision else ''}`"
    offline = environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    snapshot = cached(name, revision)
    if snapshot is not None:
        _check_weights(name, snapshot)
        if offline:
            _check_snapshot(name, snapshot, fetch)
        return f"in the Hugging Face cache ({snapshot.name[:12]})"
    if offline:
        raise ValueError(
            f"{name} is no folder, is not in the Hugging Face cache, and HF_HUB_OFFLINE forbids to fetch it. Fetch it "
            f"where there is a network ({fetch}, with the same HF_HOME), or give the path of a folder (./model)."
        )
    return _ask_hub(name, revision, fetch)


def _check_weights(name: str, snapshot: Path) -> None:
    if not any(snapshot.glob("*.safetensors")) and not any(snapshot.glob("*.bin")):
        raise ValueError(
            f"{name} is in the Hugging Face cache without its weights ({snapshot}): a download was cut, or only its "
            f"config was fetched. Run `hf download {name}`."
        )


def _check_snapshot(name: str, snapshot: Path, fetch: str) -> None:
    """All its files are there, since nothing can be fetched that it lacks."""
    from data_prep.check import check_weights

    try:
        check_weights(snapshot)
    except ValueError as error:
        lacks = str(error)
    else:
        tokenizer = [*snapshot.glob("tokenizer*"), *snapshot.glob("vocab.*")]
        lacks = "" if tokenizer else f"{snapshot} has no tokenizer."
    if lacks:
        raise ValueError(
            f"{name} is in the Hugging Face cache, and HF_HUB_OFFLINE forbids to fetch what is missing there. {lacks} "
            f"If its download was cut: {fetch} where there is a network."
        )


def _ask_hub(name: str, revision: str | None, fetch: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().model_info(name, revision=revision, timeout=15)
    except HFValidationError:
        raise ValueError(f"{name!r} is neither a folder nor a Hugging Face id. Start a path with ./ or /.") from None
    except GatedRepoError:
        raise ValueError(f"{name} asks for an agreement on its page. Agree there and `hf auth login`.") from None
    except RevisionNotFoundError:
        raise ValueError(f"{name} has no revision {revision!r} on the Hub. Leave it out, or correct it.") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{name} is no folder and the Hub has no such model, or shows it to its owners only. Check the name; start "
            "a path with ./ or /."
        ) from None
    except Exception as error:  # no network has many names: httpx, OSError, proxies
        raise ValueError(
            f"{name} is not in the Hugging Face cache, and the Hub does not answer ({type(error).__name__}). Fetch it "
            f"where there is a network ({fetch}, with the same HF_HOME), or give the path of a folder (./model)."
        ) from None
    return f"on the Hugging Face Hub ({str(info.sha)[:12]}), to be fetched"
