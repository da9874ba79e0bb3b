"""Whether a run fits its GPUs, and what it costs, before it is launched: arithmetic whose every part can be read.

verl trains and samples on the same GPUs in turn, so there are three peaks; the first two are called training:

    log-probs  weights and moments + the weights gathered in bfloat16 for the layer at work + the logits of a
               micro-batch and what their entropy takes, without a gradient
    update     weights, gradients and Adam's moments in float32, shared by all GPUs (FSDP2) + gathered weights
               + one input per layer + the larger of the logits and of one recomputed layer, which never coincide
    rollout    weights and moments (unless offloaded) + vLLM's share of the GPU, gpu_memory_utilization, in which lie
               its own bfloat16 weights, its workspace, and the key-value cache: the rest

What never goes away (CUDA contexts, NCCL) is in all three. The frozen reference lies in the host's memory (verl
offloads it under FSDP2) and passes through the GPU layer by layer. What a recipe sets under `verl:` and the arithmetic
does not count is named.

A step's time is that of measured steps where there are any: the run's own, or another layout's, scaled by the ratio of
the two layouts' arithmetic. Else it is arithmetic alone, with assumed efficiencies and every response as long as it may
be, and good to about a factor of two: no step of a GPU has been measured yet.

Line numbers are verl 0.9.1's, workers/engine/fsdp/transformer_impl.py; what its functions hold was measured, too, with
the CPU's allocator (tests/test_fit.py does it again).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from klreg_verl.experiment.architecture import Architecture
from klreg_verl.experiment.estimate import same_work
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.settings import ResourcesSpec, Settings

GIB = 1024**3

FIXED_BYTES = 5 * GIB
"""Of each GPU, whatever the model: two processes' CUDA contexts, NCCL's buffers, kernels, what the allocator loses."""
VLLM_WORKSPACE_BYTES = 2 * GIB
"""Inside vLLM's share: CUDA graphs and one pass over max_num_batched_tokens (verl: 8192)."""
MARGIN = 0.95
"""Of a GPU's memory that a plan may fill: fragmentation takes the rest."""
MFU = 0.30
"""Assumed share of a GPU's bfloat16 peak in training. Published: 11 % (0.6B, one GPU) to 35 % (4B, eight), prime-rl."""
DECODE_BANDWIDTH = 0.50
"""Assumed share of the memory bandwidth that decoding reaches."""
DECODE_SECONDS = 0.005
"""Assumed least time of one decoding step: kernels' launches and the scheduler."""
VERL_UTILIZATION, VERL_SEQUENCES = 0.5, 256
"""verl 0.9.1's rollout.gpu_memory_utilization and rollout.max_num_seqs."""
PACKED_TOKENS = 16384
"""Of a micro-batch packed by tokens, at the least."""
LOGIT_BYTES = 2
"""Of one logit, of policy and reference, and of its gradient: bfloat16, as the output head gives it under autocast."""
BLOCK_ELEMENTS = 1 << 26
"""Logits that core/logprobs.py works on at a time; the test of both keeps them equal."""
_ACTOR, _REF, _ROLLOUT, _MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "ref", "rollout", "model"))
_ACTOR_FSDP, _REF_FSDP = f"{_ACTOR}.fsdp_config", f"{_REF}.fsdp_config"

NOT_COUNTED: Mapping[str, tuple[Any, ...]] = {
    f"{_MODEL}.use_fused_kernels": (False,),
    f"{_MODEL}.lora_rank": (0,),
    f"{_MODEL}.lora_adapter_path": (None,),
    f"{_MODEL}.enable_activation_offload": (False,),
    f"{_ACTOR}.strategy": ("fsdp2",),
    f"{_ACTOR}.ulysses_sequence_parallel_size": (1,),
    f"{_ACTOR}.calculate_entropy": (False,),
    f"{_ACTOR}.entropy_coeff": (0,),
    f"{_ACTOR}.entropy_from_logits_with_chunking": (False,),
    f"{_ACTOR}.optim.optimizer": ("AdamW",),
    f"{_ACTOR_FSDP}.ulysses_sequence_parallel_size": (1,),
    f"{_ACTOR_FSDP}.entropy_from_logits_with_chunking": (False,),
    f"{_ACTOR_FSDP}.reshard_after_forward": (True,),
    f"{_ACTOR_FSDP}.mixed_precision": (None,),
    f"{_ROLLOUT}.dtype": ("bfloat16",),
    f"{_ROLLOUT}.quantization": (None,),
    f"{_ROLLOUT}.max_num_batched_tokens": (8192,),
    f"{_ROLLOUT}.data_parallel_size": (1,),
    f"{_ROLLOUT}.pipeline_model_parallel_size": (1,),
    f"{_ROLLOUT}.log_prob_max_token_len_per_gpu": (),
}
"""verl's keys that change memory in a way that is not counted here, and the values at which they do not."""

Phase = Literal["log-probs", "update", "training", "rollout", "both"]
"""Training is log-probs and update; both is training and rollout."""


@dataclass(frozen=True, kw_only=True)
class GPU:
    """One kind of GPU; peaks are the data sheet's, dense bfloat16."""

    name: str
    memory_bytes: int
    bandwidth: float
    """[bytes/s]"""
    flops: float
    """[operations/s]"""


def _gpu(name: str, mib: int, terabytes: float, teraflops: float) -> GPU:
    return GPU(name=name, memory_bytes=mib * 1024**2, bandwidth=terabytes * 1e12, flops=teraflops * 1e12)


_TABLE = {
    _gpu("B200", 183359, 8.0, 2250): (),
    _gpu("H200", 143771, 4.8, 989): (),
    _gpu("H100-NVL", 95830, 3.9, 835): (),
    _gpu("H100-PCIe", 81559, 2.0, 756): (),
    _gpu("H100", 81559, 3.35, 989): ("h100-80gb-hbm3", "h100-sxm"),
    _gpu("A100-40GB", 40960, 1.555, 312): ("a100-sxm4-40gb", "a100-pcie-40gb"),
    _gpu("A100", 81920, 2.04, 312): ("a100-80gb", "a100-sxm4-80gb", "a100-80gb-pcie"),
    _gpu("L40S", 46068, 0.864, 362): (),
    _gpu("RTX-4090", 24564, 1.008, 165): (),
}
"""Memory as nvidia-smi tells it [MiB]; bandwidth [TB/s] and dense bfloat16 [TFLOP/s] from NVIDIA's data sheets; other
names, as nvidia-smi has them."""
GPUS: dict[str, GPU] = {each.name: each for each in _TABLE}
_NAMED = {name.lower(): each for each, others in _TABLE.items() for name in (each.name, *others)}


def gpu_named(name: str, memory_bytes: int | None = None) -> GPU:
    """A GPU by a name of the table, or by what nvidia-smi calls it; its memory, where given, is what counts.

    Raises:
        ValueError: no GPU of the table is meant.
    """
    told = [part for part in name.lower().split() if part not in ("nvidia", "geforce", "tesla")]
    found = _NAMED.get("-".join(told))
    if found is None:
        raise ValueError(f"{name!r} is no GPU that is known here: {', '.join(GPUS)}.")
    return found if memory_bytes is None else replace(found, memory_bytes=memory_bytes)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One entry of the memory table."""

    role: Literal["actor", "reference", "rollout", "all"]
    what: str
    phase: Phase
    bytes: int
    """Per GPU."""


@dataclass(frozen=True, kw_only=True)
class Time:
    """One step [s], by stage where it is arithmetic."""

    seconds: float
    source: Literal["measured", "scaled", "arithmetic"]
    said: str
    """In words, for the table."""
    stages: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One run on one layout of one kind of GPU."""

    model: Architecture
    gpu: GPU
    resources: ResourcesSpec
    parts: tuple[Part, ...]
    host_bytes: int
    """Per node: the reference, pinned, and what verl keeps there of the actor."""
    kv_tokens: int
    """That an engine's cache holds."""
    sequences: int
    """That an engine decodes at a time, at full length."""
    tokens_per_step: int
    """Prompts and responses, if every response were as long as it may be."""
    micro_batch_tokens: int
    time: Time
    gpu_hours: float
    """Of all steps of this run."""
    problems: tuple[str, ...]
    """Why it cannot run so; empty where it fits."""
    uncounted: tuple[str, ...] = ()
    """Keys of the recipe's `verl:` block that change memory and are not in these numbers, `key=value`."""

    @property
    def training_bytes(self) -> int:
        return _peak(_training(self.parts))

    @property
    def rollout_bytes(self) -> int:
        return _peak(_during(self.parts, "rollout"))

    @property
    def fits(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        derived = {name: getattr(self, name) for name in ("training_bytes", "rollout_bytes", "fits")}
        return {**asdict(self), "parameters": self.model.parameters, **derived}


def _during(parts: Sequence[Part], phase: Phase) -> list[Part]:
    """What is there in log-probs, update or rollout."""
    wider = ("both",) if phase == "rollout" else ("training", "both")
    return [part for part in parts if part.phase in (phase, *wider)]


def _training(parts: Sequence[Part]) -> list[Part]:
    """What is there at training's peak."""
    return max(_during(parts, "log-probs"), _during(parts, "update"), key=_peak)


def _peak(parts: Sequence[Part]) -> int:
    return sum(part.bytes for part in parts)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A run that has done steps."""

    spec: RunSpec
    seconds: float
    """Median of its steps."""


# ---------------------------------------------------------------------------------------------------- one run


def fit(spec: RunSpec, model: Architecture, gpu: GPU, measured: Sequence[Measured] = ()) -> Fit:
    """Memory, time and cost of a run as its recipe lays it out.

    Args:
        spec: the run.
        model: its architecture.
        gpu: the kind of GPU, the same everywhere.
        measured: runs of the same recipe that have done steps on such GPUs.
    """
    parts = memory(spec, model, gpu)
    kv = max(0, _cache_bytes(spec, model, gpu))
    kv_tokens = kv // kv_bytes(spec, model)
    time = step_time(spec, model, gpu, measured)
    return Fit(
        model=model,
        gpu=gpu,
        resources=spec.resources,
        parts=parts,
        host_bytes=host_bytes(spec, model),
        kv_tokens=kv_tokens,
        sequences=min(_max_sequences(spec), kv_tokens // _longest(spec)),
        tokens_per_step=_responses(spec) * _longest(spec),
        micro_batch_tokens=micro_batch_tokens(spec),
        time=time,
        gpu_hours=time.seconds * spec.train.steps * spec.resources.world_size / 3600,
        problems=tuple(_problems(spec, gpu, model, parts, kv, kv_tokens)),
        uncounted=uncounted(spec),
    )


def memory(spec: RunSpec, model: Architecture, gpu: GPU) -> tuple[Part, ...]:
    """Every entry of the memory table [bytes per GPU]."""
    return (*_trainer(spec, model), *_working(spec, model), *_engine(spec, model, gpu))


def _trainer(spec: RunSpec, model: Architecture) -> list[Part]:
    """Weights, gradients and Adam's two moments, each in the model's dtype, float32 unless said, over FSDP's group."""
    size = _weight_bytes(spec, _ACTOR_FSDP)
    share, dtype = size * -(-model.parameters // _group(spec, _ACTOR_FSDP)), "float32" if size == 4 else "bfloat16"
    weights: Phase = "training" if _is_set(spec, f"{_ACTOR_FSDP}.param_offload") else "both"
    moments: Phase = "training" if _is_set(spec, f"{_ACTOR_FSDP}.optimizer_offload") else "both"
    here = 0 if _is_set(spec, f"{_ACTOR_FSDP}.offload_policy") else 1
    return [
        Part(role="actor", what=f"weights ({dtype})", phase=weights, bytes=here * share),
        Part(role="actor", what=f"gradients ({dtype})", phase="update", bytes=here * share),
        Part(role="actor", what=f"Adam's moments ({dtype})", phase=moments, bytes=here * 2 * share),
        Part(role="actor", what="gradients not yet shared out", phase="update", bytes=_unsynced(spec, model)),
    ]


def _weight_bytes(spec: RunSpec, engine: str) -> int:
    """Of one stored weight; verl's model_dtype is fp32, and of a reference where it is null bf16 (line 260)."""
    said = _said(spec, f"{engine}.model_dtype", "fp32")
    half = ("bf16", "bfloat16", "fp16", "float16", "16")
    return 2 if str(said) in half or (said is None and engine == _REF_FSDP) else 4


def _group(spec: RunSpec, engine: str) -> int:
    """GPUs over which weights are shared: fsdp_size, else all."""
    size, most = _said(spec, f"{engine}.fsdp_size", -1), spec.resources.world_size
    if not isinstance(size, int) or size == 0:
        raise ValueError(f"verl.{engine}.fsdp_size is {size!r}: give a number of GPUs, or -1 for all of them.")
    return most if size < 0 else min(size, most)


def _unsynced(spec: RunSpec, model: Architecture) -> int:
    """Whole gradients in float32, where micro-batches are added up before they are shared out (lines 692 to 719)."""
    return 4 * model.parameters if _is_set(spec, f"{_ACTOR_FSDP}.use_no_sync_for_gradient_accumulation") else 0


def _working(spec: RunSpec, model: Architecture) -> list[Part]:
    """What exists while a micro-batch is at work: first without a gradient, then with one."""
    tokens, layer = micro_batch_tokens(spec), layer_bytes(model)
    scored = tokens * model.vocabulary * entropy_bytes(spec)
    passing = 2 * 2 * model.layer_parameters + 2 * model.outer_parameters
    return [
        *_gathered(model),
        _larger("log-probs", ("logits and their entropy", scored), ("one layer", tokens * layer)),
        Part(role="actor", what="activations kept", phase="update", bytes=tokens * kept_bytes(spec, model)),
        _larger("update", ("logits", logits_bytes(spec, model)), ("one layer and its gradient", 2 * tokens * layer)),
        Part(role="reference", what="layers passing through", phase="update", bytes=_compared(spec) * passing),
        Part(role="all", what="CUDA, NCCL, allocator", phase="both", bytes=FIXED_BYTES),
    ]


def _larger(phase: Phase, *either: tuple[str, int]) -> Part:
    """Of two things that are never there at once."""
    what, size = max(either, key=lambda one: one[1])
    return Part(role="actor", what=what, phase=phase, bytes=size)


def _gathered(model: Architecture) -> list[Part]:
    """bfloat16: embedding and head, two layers (one is fetched ahead), and the gradients of head and one layer."""
    weights = 2 * (model.outer_parameters + 2 * model.layer_parameters)
    gradients = 2 * (model.outer_parameters + model.layer_parameters)
    return [
        Part(role="actor", what="gathered weights (bfloat16)", phase="training", bytes=weights),
        Part(role="actor", what="gathered weights' gradients (bfloat16)", phase="update", bytes=gradients),
    ]


def layer_bytes(model: Architecture) -> int:
    """Per token, one layer's forward pass in bfloat16; backward has as much again.

    Norms' and attention's inputs and outputs, 8 of hidden width, keys and values, and the MLP's gate, up, activation
    and product.
    """
    return 2 * (8 * model.hidden + 2 * model.kv_width + 4 * model.intermediate)


def kept_bytes(spec: RunSpec, model: Architecture) -> int:
    """Per token, from forward to backward: each layer's input, or without gradient checkpointing all that it made."""
    checkpointing = _said(spec, f"{_MODEL}.enable_gradient_checkpointing", True)
    return model.layers * (2 * model.hidden if checkpointing else layer_bytes(model))


def _is_packed(spec: RunSpec) -> bool:
    """Without padding, which needs flash-attn; else rows are padded, and its cross-entropy is not expected, either."""
    return bool(_said(spec, f"{_MODEL}.use_remove_padding", True))


def _compared(spec: RunSpec) -> bool:
    """Whether updates have both models' logits at once: a KL over the vocabulary in the loss, or as a probe."""
    return spec.kl.is_exact or spec.probes.exact_every > 0


def _scaled(spec: RunSpec) -> int:
    """Copies of the logits over the temperature (lines 98 to 103): none at 1."""
    return int(spec.train.temperature != 1)


def entropy_bytes(spec: RunSpec) -> int:
    """Per token and word, while old log-probabilities and entropies are taken: the logits and their scaled copy.

    Packed, verl compiles the entropy (line 183) into loops that hold nothing more. Padded, it takes it as it stands
    (line 1491): 4 B for the softmax, which torch's autocast takes in float32, and beside it, inside logsumexp, 4 B for
    the cast of the logits and 4 B for the exponentials.
    """
    held = LOGIT_BYTES * (1 + _scaled(spec))
    if _is_packed(spec) and _said(spec, f"{_ACTOR_FSDP}.use_torch_compile", True):
        return held
    return held + 8 + (4 if LOGIT_BYTES < 4 else 0)


def _copies(spec: RunSpec) -> int:
    """Of one model's logits in its forward pass: raw, scaled, and, where rows are padded, put together (line 1504)."""
    return 1 + _scaled(spec) + (not _is_packed(spec))


def logits_bytes(spec: RunSpec, model: Architecture) -> int:
    """Of a micro-batch, at an update's largest.

    Forward holds all copies. Backward holds what it needs and a gradient: packed, flash-attn's cross-entropy writes
    that over the logits (line 1426), and their scaling makes one more; padded, the last two copies are still there, and
    core/logprobs.py takes two float32 buffers for a block of rows.
    """
    if _compared(spec):
        return _compared_bytes(spec, model)
    one = micro_batch_tokens(spec) * model.vocabulary * LOGIT_BYTES
    return one * _copies(spec) if _is_packed(spec) else 3 * one + _block_bytes(spec, model, 2)


def _compared_bytes(spec: RunSpec, model: Architecture) -> int:
    """Of both models, verl_hooks/exact.py.

    First the reference's forward pass beside the policy's logits, each with all copies; then one of the reference's is
    left, is compared block by block, and a loss over the vocabulary writes its gradient down. core/exact.py takes 8
    float32 buffers to compare whole distributions (5 for topk), and two to widen both models' logits.
    """
    one = micro_batch_tokens(spec) * model.vocabulary * LOGIT_BYTES
    held = one * (_copies(spec) + 1 + spec.kl.is_exact)
    return max(2 * one * _copies(spec), held + _block_bytes(spec, model, 8 + (2 if LOGIT_BYTES < 4 else 0)))


def _block_bytes(spec: RunSpec, model: Architecture, buffers: int) -> int:
    """float32, for the rows that are worked on at a time."""
    tokens = min(micro_batch_tokens(spec), max(1, BLOCK_ELEMENTS // model.vocabulary))
    return 4 * buffers * tokens * model.vocabulary


def _engine(spec: RunSpec, model: Architecture, gpu: GPU) -> list[Part]:
    """vLLM's share, whose rest is the key-value cache; verl gives it back while it trains, unless told to keep it."""
    asleep = all(_said(spec, f"{_ROLLOUT}.{key}", True) for key in ("free_cache_engine", "enable_sleep_mode"))
    phase: Phase = "rollout" if asleep else "both"
    cache = max(0, _cache_bytes(spec, model, gpu))
    return [
        Part(role="rollout", what="weights (bfloat16)", phase=phase, bytes=_vllm_weights(spec, model)),
        Part(role="rollout", what="workspace", phase=phase, bytes=VLLM_WORKSPACE_BYTES),
        Part(role="rollout", what="key-value cache", phase=phase, bytes=cache),
    ]


def _vllm_weights(spec: RunSpec, model: Architecture) -> int:
    return 2 * model.parameters // spec.resources.tensor_parallel


def _cache_bytes(spec: RunSpec, model: Architecture, gpu: GPU) -> int:
    """What weights and workspace leave of vLLM's share of one GPU; negative where they do not fit."""
    return int(utilization(spec) * gpu.memory_bytes) - _vllm_weights(spec, model) - VLLM_WORKSPACE_BYTES


def kv_bytes(spec: RunSpec, model: Architecture) -> int:
    """Key-value cache of one token on one GPU of an engine; vLLM shares out the heads, and no GPU has none."""
    kind = str(_said(spec, f"{_ROLLOUT}.engine_kwargs.vllm.kv_cache_dtype", "auto"))
    heads = max(1, model.kv_heads // spec.resources.tensor_parallel)
    return 2 * (1 if kind.startswith("fp8") else 2) * model.layers * model.head_dim * heads


def host_bytes(spec: RunSpec, model: Architecture) -> int:
    """Per node. FSDP2 pins the reference; of the actor there is what one of verl's offloads moved.

    With offload_policy that is weights, gradients (pinned both) and moments; param_offload and optimizer_offload pin
    weights and moments while they are not used.
    """
    actor = pinned_bytes(model, _group(spec, _ACTOR_FSDP), _weight_bytes(spec, _ACTOR_FSDP))
    moments = 2 * _weight_bytes(spec, _ACTOR_FSDP) * -(-model.parameters // _group(spec, _ACTOR_FSDP))
    held = pinned_bytes(model, _group(spec, _REF_FSDP), _weight_bytes(spec, _REF_FSDP))
    if _is_set(spec, f"{_ACTOR_FSDP}.offload_policy"):
        held += 2 * actor + moments
    else:
        held += actor * _is_set(spec, f"{_ACTOR_FSDP}.param_offload")
        held += 2 * actor * _is_set(spec, f"{_ACTOR_FSDP}.optimizer_offload")
    return held * spec.resources.gpus_per_node


def pinned_bytes(model: Architecture, group: int, size: int) -> int:
    """One process's shards of all weights: FSDP2 cuts each along its rows, torch pins powers of two.

    Args:
        model: whose weights.
        group: processes that share them.
        size: bytes of a weight.

    Source: torch, ATen/core/CachingHostAllocator.h: PowerOf2Ceil of each block, unless told otherwise.
    """
    return sum(count * _power_of_two(size * -(-rows // group) * width) for rows, width, count in _tensors(model))


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _tensors(model: Architecture) -> Iterator[tuple[int, int, int]]:
    """(rows, numbers of a row, how often) of every weight: Llama's layout, q, k and v with a bias in Qwen2."""
    query, kv, hidden, layers = model.heads * model.head_dim, model.kv_width, model.hidden, model.layers
    yield model.vocabulary, hidden, 1 if model.tied else 2
    yield query, hidden, layers
    yield kv, hidden, 2 * layers
    yield hidden, query, layers
    yield model.intermediate, hidden, 2 * layers
    yield hidden, model.intermediate, layers
    yield hidden, 1, 2 * layers + 1
    if model.qkv_bias:
        yield query, 1, layers
        yield kv, 1, 2 * layers
    if model.qk_norm:
        yield model.head_dim, 1, 2 * layers


def micro_batch_tokens(spec: RunSpec) -> int:
    """Tokens of one forward pass on one GPU: packed by tokens, or `micro_batch` whole responses."""
    if spec.train.micro_batch is None:
        return min(packed_tokens(spec), -(-_responses(spec) // spec.resources.world_size) * _longest(spec))
    return spec.train.micro_batch * _longest(spec)


def packed_tokens(spec: RunSpec) -> int:
    """verl's limit of a micro-batch that is packed by tokens, as overrides.py sets it on a GPU."""
    return max(PACKED_TOKENS, 2 * _longest(spec))


def utilization(spec: RunSpec) -> float:
    """Share of each GPU that vLLM takes."""
    return float(_said(spec, f"{_ROLLOUT}.gpu_memory_utilization", VERL_UTILIZATION))


def _max_sequences(spec: RunSpec) -> int:
    return int(_said(spec, f"{_ROLLOUT}.max_num_seqs", VERL_SEQUENCES))


def _said(spec: RunSpec, key: str, otherwise: Any) -> Any:
    """A key of the recipe's `verl` block (dotted: recipes are flattened), else verl's default."""
    return spec.verl.get(key, otherwise)


def _is_set(spec: RunSpec, key: str) -> bool:
    """Of a switch that verl has off."""
    return bool(_said(spec, key, False))


def uncounted(spec: RunSpec) -> tuple[str, ...]:
    """Keys of the run's `verl:` block whose part in memory is not in the arithmetic, `key=value`."""
    return tuple(f"{key}={value}" for key, value in spec.verl.items() if not _is_harmless(key, value))


def _is_harmless(key: str, value: Any) -> bool:
    known = next((known for known in NOT_COUNTED if key == known or key.startswith(f"{known}.")), None)
    return known is None or value in NOT_COUNTED[known]


def _longest(spec: RunSpec) -> int:
    return spec.train.max_prompt_tokens + spec.train.max_response_tokens


def _responses(spec: RunSpec) -> int:
    return spec.train.prompts_per_step * spec.train.responses_per_prompt


def _problems(
    spec: RunSpec, gpu: GPU, model: Architecture, parts: Sequence[Part], kv: int, kv_tokens: int
) -> Iterable[str]:
    room = int(MARGIN * gpu.memory_bytes)
    for phase, there in {"training": _training(parts), "rollout": _during(parts, "rollout")}.items():
        if (needed := _peak(there)) > room:
            yield _too_much(phase, needed, room, gpu, there)
    if kv <= 0:
        share = utilization(spec) * gpu.memory_bytes
        yield (
            f"rollout: vLLM's share of {share / GIB:.1f} GiB does not hold the model's weights "
            f"({_vllm_weights(spec, model) / GIB:.1f} GiB) and its workspace. Raise resources.tensor_parallel or "
            f"verl {_ROLLOUT}.gpu_memory_utilization."
        )
    elif kv_tokens < _longest(spec):
        yield (
            f"rollout: the key-value cache of {kv / GIB:.1f} GiB holds {kv_tokens:,} tokens, one sequence may have "
            f"{_longest(spec):,}. Raise resources.tensor_parallel or verl {_ROLLOUT}.gpu_memory_utilization."
        )
    if model.heads % spec.resources.tensor_parallel:
        yield f"rollout: {model.heads} heads cannot be split over tensor_parallel={spec.resources.tensor_parallel}."


def _too_much(phase: str, needed: int, room: int, gpu: GPU, parts: Sequence[Part]) -> str:
    largest = sorted(parts, key=lambda part: -part.bytes)[:4]
    listed = ", ".join(f"{part.what} {part.bytes / GIB:.1f}" for part in largest)
    return (
        f"{phase}: {needed / GIB:.1f} GiB are needed on each GPU, {room / GIB:.1f} of {gpu.memory_bytes / GIB:.1f} GiB "
        f"can be used on {gpu.name} (largest: {listed})."
    )


# ---------------------------------------------------------------------------------------------------- time


def step_time(spec: RunSpec, model: Architecture, gpu: GPU, measured: Sequence[Measured] = ()) -> Time:
    """One step without validation and saving; measured where that is possible, else arithmetic, and it says which."""
    stages = stage_seconds(spec, model, gpu)
    own = sum(stages.values())
    nearest = _nearest(spec, measured)
    if nearest is None:
        assumed = f"every response at its longest, {MFU:.0%} of peak, {DECODE_BANDWIDTH:.0%} of bandwidth"
        said = f"arithmetic, within about a factor of two where a step takes minutes: {assumed}"
        return Time(seconds=own, source="arithmetic", said=said, stages=stages)
    other, seconds = nearest.spec, nearest.seconds
    if same_work(spec, other):
        return Time(seconds=seconds, source="measured", said=f"measured: {other.run_id}", stages={})
    ratio = own / sum(stage_seconds(other, model, gpu).values())
    said = f"{seconds:.1f} s measured in {other.run_id}, times {ratio:.2f} by arithmetic"
    return Time(seconds=seconds * ratio, source="scaled", said=said, stages={})


def stage_seconds(spec: RunSpec, model: Architecture, gpu: GPU) -> dict[str, float]:
    """Arithmetic alone: generation, log-probabilities of policy and reference, update.

    A token's forward pass is 2 operations per weight; backward is two of them, recomputing one more. Decoding reads the
    weights and the cache of every sequence at half its length, on average.
    """
    forward = _responses(spec) * _longest(spec) * model.forward_flops(_longest(spec) / 2)
    seconds = forward / (spec.resources.world_size * gpu.flops * MFU)
    recomputed = 4 if _said(spec, f"{_MODEL}.enable_gradient_checkpointing", True) else 3
    return {
        "generation": _generation_seconds(spec, model, gpu),
        "old log-probs": seconds,
        "reference": seconds,
        "update": (recomputed + (1 if spec.kl.is_exact else 0)) * seconds,
    }


def _generation_seconds(spec: RunSpec, model: Architecture, gpu: GPU) -> float:
    parallel = spec.resources.tensor_parallel
    per_engine = -(-_responses(spec) * parallel // spec.resources.world_size)
    room = max(1, _cache_bytes(spec, model, gpu) // kv_bytes(spec, model) // _longest(spec))
    at_once = min(per_engine, _max_sequences(spec), room)
    context = spec.train.max_prompt_tokens + spec.train.max_response_tokens / 2
    read = 2 * model.parameters / parallel + at_once * context * kv_bytes(spec, model)
    token = max(DECODE_SECONDS, read / (gpu.bandwidth * DECODE_BANDWIDTH))
    return per_engine / at_once * spec.train.max_response_tokens * token


def _nearest(spec: RunSpec, measured: Sequence[Measured]) -> Measured | None:
    """The run itself first, then those that do the same work, its arm's before others, then its model's in any way."""
    same = [one for one in measured if same_work(one.spec, spec)]
    own = [one for one in same if one.spec.run_id == spec.run_id]
    arms = [one for one in same if one.spec.arm == spec.arm]
    return next(iter(own or arms or same or [one for one in measured if one.spec.model == spec.model]), None)


# ---------------------------------------------------------------------------------------------------- layouts


def layouts(most_gpus: int, per_node: int) -> list[list[ResourcesSpec]]:
    """Parts of a node and whole nodes, the smallest first; of each, engines of 1 to 8 GPUs."""
    found = []
    for count in (1, 2, 4, 8, 16, 32, 64):
        nodes, gpus = -(-count // per_node), min(count, per_node)
        if count <= most_gpus and nodes * gpus == count:
            sizes = [size for size in (1, 2, 4, 8) if size <= gpus and gpus % size == 0]
            found.append([ResourcesSpec(nodes=nodes, gpus_per_node=gpus, tensor_parallel=size) for size in sizes])
    return found


def cheapest(
    spec: RunSpec, model: Architecture, gpu: GPU, measured: Sequence[Measured] = (), per_node: int = 8
) -> Fit | None:
    """The layout of fewest GPU-hours that fits, up to eight nodes, or the run's own; None where none does.

    Engines are as small as fits: what a larger one costs in communication is not in the arithmetic.
    """
    given = fit(spec, model, gpu, measured)
    found = [_smallest_engine(spec, model, gpu, measured, sizes) for sizes in layouts(8 * per_node, per_node)]
    fitting = [one for one in (given, *found) if one is not None and one.fits]
    return min(fitting, key=_cost, default=None)


def _smallest_engine(
    spec: RunSpec, model: Architecture, gpu: GPU, measured: Sequence[Measured], sizes: Sequence[ResourcesSpec]
) -> Fit | None:
    placed = (_placed(spec, layout) for layout in sizes)
    tried = (fit(one, model, gpu, measured) for one in placed if one is not None)
    return next((one for one in tried if one.fits), None)


def _cost(one: Fit) -> tuple[float, int]:
    return round(one.gpu_hours, 3), one.resources.world_size


def _placed(spec: RunSpec, layout: ResourcesSpec) -> RunSpec | None:
    """The run on another layout; None where its batch cannot be shared so."""
    names = (name for name in Settings.__dataclass_fields__ if name != "resources")
    try:
        Settings(**{name: getattr(spec, name) for name in names}, resources=layout)
    except ValueError:
        return None
    return replace(spec, resources=layout)


# ---------------------------------------------------------------------------------------------------- a recipe


@dataclass(frozen=True, kw_only=True)
class RecipeFit:
    """All runs of a recipe on one kind of GPU."""

    gpu: GPU
    runs: dict[str, Fit]
    cheapest: dict[str, Fit | None]
    """By run, too."""
    unknown: dict[str, str]
    """Runs whose model is not known, and why."""

    @property
    def gpu_hours(self) -> float:
        """Of the whole recipe, steps alone."""
        return sum(one.gpu_hours for one in self.runs.values())

    @property
    def problems(self) -> dict[str, tuple[str, ...]]:
        return {run: one.problems for run, one in self.runs.items() if one.problems}


def fit_all(
    specs: Sequence[RunSpec],
    gpu: GPU,
    model_of: Callable[[RunSpec], Architecture],
    measured: Sequence[Measured] = (),
    per_node: int = 8,
) -> RecipeFit:
    """`fit` and `cheapest` of every run; seeds of one arm are computed once.

    `model_of` may raise ValueError: the run is then among the unknown.
    """
    runs: dict[str, Fit] = {}
    best: dict[str, Fit | None] = {}
    unknown: dict[str, str] = {}
    done: dict[str, tuple[Fit, Fit | None]] = {}
    for spec in specs:
        try:
            model = model_of(spec)
        except ValueError as error:
            unknown[spec.run_id] = str(error)
            continue
        key = replace(spec, seed=0).hash + str(spec.train.steps)
        if key not in done:
            done[key] = fit(spec, model, gpu, measured), cheapest(spec, model, gpu, measured, per_node)
        runs[spec.run_id], best[spec.run_id] = done[key]
    return RecipeFit(gpu=gpu, runs=runs, cheapest=best, unknown=unknown)


# ---------------------------------------------------------------------------------------------------- in words


def layout_in_words(layout: ResourcesSpec) -> str:
    """`2 x 8 GPUs, engines of 2`."""
    nodes = f"{layout.nodes} x " if layout.nodes > 1 else ""
    engines = f", engines of {layout.tensor_parallel}" if layout.tensor_parallel > 1 else ""
    return f"{nodes}{layout.gpus_per_node} GPU{'s' if layout.world_size > 1 else ''}{engines}"


def lines(found: RecipeFit) -> list[str]:
    """For a terminal: each different fit once, the recipe's GPU-hours, the cheapest layout."""
    told = [f"not known: {why}" for why in dict.fromkeys(found.unknown.values())]
    for one, run_ids in _alike_runs(found):
        told += [f"fit on {found.gpu.name}, {layout_in_words(one.resources)} ({_runs_in_words(run_ids)}):"]
        told += [f"  {line}" for line in table(one)]
        told += _advice(one, found.cheapest[run_ids[0]])
    if found.runs:
        told.append(_total(found))
    return told


def _alike_runs(found: RecipeFit) -> list[tuple[Fit, list[str]]]:
    """Fits that say the same, each with its runs."""
    groups: list[tuple[Fit, list[str]]] = []
    for run, one in found.runs.items():
        same = next((runs for other, runs in groups if other == one), None)
        if same is None:
            groups.append((one, [run]))
        else:
            same.append(run)
    return groups


def _runs_in_words(run_ids: Sequence[str]) -> str:
    arms = ", ".join(dict.fromkeys(run.split("/")[0] for run in run_ids))
    return f"{len(run_ids)} run{'s' if len(run_ids) > 1 else ''}: {arms}"


def table(one: Fit) -> list[str]:
    """Memory per role and GPU, tokens, time."""
    parts = [part for part in one.parts if part.bytes]
    width = max(len(f"{part.role} {part.what}") for part in parts)
    rows = [f"{f'{part.role} {part.what}':<{width}} {part.bytes / GIB:7.2f} GiB  {part.phase}" for part in parts]
    room = one.gpu.memory_bytes / GIB
    return [
        *rows,
        f"peak {one.training_bytes / GIB:.1f} GiB training, {one.rollout_bytes / GIB:.1f} GiB rollout, "
        f"of {room:.1f} GiB; host {one.host_bytes / GIB:.1f} GiB a node",
        f"{one.tokens_per_step:,} tokens a step at most, {one.micro_batch_tokens:,} a micro-batch; an engine's cache "
        f"holds {one.kv_tokens:,} tokens, {one.sequences} sequences of full length",
        f"step {one.time.seconds:.1f} s ({one.time.said})",
        *(f"not counted: {key}" for key in one.uncounted),
        *(f"DOES NOT FIT. {problem}" for problem in one.problems),
    ]


def _advice(one: Fit, best: Fit | None) -> list[str]:
    if best is None:
        return ["  no layout of up to 8 nodes fits: shorten responses, set train.micro_batch, or take larger GPUs"]
    if best.resources == one.resources:
        return ["  this is the cheapest layout that fits"]
    said = f"{best.gpu_hours:.1f} GPU-hours and {best.gpu_hours / best.resources.world_size:.1f} h a run"
    given = f"{one.gpu_hours:.1f} and {one.gpu_hours / one.resources.world_size:.1f}" if one.fits else "does not fit"
    return [f"  cheapest that fits: {layout_in_words(best.resources)}, {said} (as written: {given})"]


def _total(found: RecipeFit) -> str:
    sources = ", ".join(dict.fromkeys(one.time.source for one in found.runs.values()))
    best = [one.gpu_hours for one in found.cheapest.values() if one is not None]
    cheap = f"; {sum(best):,.0f} on the cheapest layouts" if len(best) == len(found.runs) else ""
    hours = f"{found.gpu_hours:,.0f} GPU-hours of steps ({sources}; without start-up and validation){cheap}"
    refused = f"; {len(found.problems)} of {len(found.runs)} runs do not fit" if found.problems else ""
    return f"whole recipe on {found.gpu.name}: {hours}{refused}"


def require(found: RecipeFit) -> str:
    """Refuse what cannot fit, with the numbers and, where there is one, a layout that fits.

    Returns what is only a caution: of runs that do not fit by arithmetic which leaves out something that they set.

    Raises:
        ValueError: a run does not fit.
    """
    refused = [run for run in found.problems if not found.runs[run].uncounted]
    if refused:
        raise ValueError(_refusal(found, refused[0]))
    run = next(iter(found.problems), None)
    return "" if run is None else f"; caution: {_refusal(found, run)}"


def _refusal(found: RecipeFit, run: str) -> str:
    best = found.cheapest[run]
    way = (
        f"It would fit on {layout_in_words(best.resources)} (resources.nodes={best.resources.nodes} "
        f"resources.gpus_per_node={best.resources.gpus_per_node} "
        f"resources.tensor_parallel={best.resources.tensor_parallel})."
        if best is not None
        else "No layout of up to 8 nodes fits: shorten train.max_response_tokens or set train.micro_batch."
    )
    there = layout_in_words(found.runs[run].resources)
    return f"{run} does not fit {there}. {' '.join(found.problems[run])} {way}"
