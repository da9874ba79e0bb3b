"""Whether a run fits its GPUs, and what it costs, before it is launched: arithmetic whose every part can be read.

verl trains and samples on the same GPUs in turn, so there are two peaks:

    training   weights, gradients and Adam's moments in float32, shared by all GPUs (FSDP2)
               + the weights gathered in bfloat16 for the layer at work + activations (one input per layer is kept, one
               layer at a time is recomputed) + logits of a micro-batch + what never goes away (CUDA contexts, NCCL)
    rollout    weights and moments (unless offloaded) + vLLM's share of the GPU, gpu_memory_utilization, in which lie
               its own bfloat16 weights, its workspace, and the key-value cache: the rest

The frozen reference lies in the host's memory (verl offloads it under FSDP2) and passes through the GPU layer by layer.

A step's time is that of measured steps where there are any: the run's own, or another layout's, scaled by the ratio of
the two layouts' arithmetic. Else it is arithmetic alone, with every response as long as it may be: a ceiling in length,
with assumed efficiencies that MEASURED_ON says nothing about yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
_ROLLOUT = "actor_rollout_ref.rollout"
_ACTOR_FSDP = "actor_rollout_ref.actor.fsdp_config"
_MODEL = "actor_rollout_ref.model"

Phase = Literal["training", "rollout", "both"]


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
    """Pinned, per node: the reference."""
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

    @property
    def training_bytes(self) -> int:
        return _peak(self.parts, "training")

    @property
    def rollout_bytes(self) -> int:
        return _peak(self.parts, "rollout")

    @property
    def fits(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        derived = {name: getattr(self, name) for name in ("training_bytes", "rollout_bytes", "fits")}
        return {**asdict(self), "parameters": self.model.parameters, **derived}


def _peak(parts: Sequence[Part], phase: Phase) -> int:
    return sum(part.bytes for part in parts if part.phase in (phase, "both"))


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
    share = utilization(spec) * gpu.memory_bytes
    kv = max(0, int(share) - _vllm_weights(spec, model) - VLLM_WORKSPACE_BYTES)
    kv_tokens = kv * spec.resources.tensor_parallel // model.kv_bytes
    time = step_time(spec, model, gpu, measured)
    return Fit(
        model=model,
        gpu=gpu,
        resources=spec.resources,
        parts=parts,
        host_bytes=4 * model.parameters * spec.resources.gpus_per_node // spec.resources.world_size,
        kv_tokens=kv_tokens,
        sequences=min(_max_sequences(spec), kv_tokens // _longest(spec)),
        tokens_per_step=_responses(spec) * _longest(spec),
        micro_batch_tokens=micro_batch_tokens(spec),
        time=time,
        gpu_hours=time.seconds * spec.train.steps * spec.resources.world_size / 3600,
        problems=tuple(_problems(spec, gpu, model, parts, kv, kv_tokens)),
    )


def memory(spec: RunSpec, model: Architecture, gpu: GPU) -> tuple[Part, ...]:
    """Every entry of the memory table [bytes per GPU]."""
    return (*_trainer(spec, model), *_working(spec, model), *_engine(spec, model, gpu))


def _trainer(spec: RunSpec, model: Architecture) -> list[Part]:
    """float32 weights 4 B, gradients 4 B, Adam's two moments 8 B per parameter, over all GPUs."""
    share = -(-model.parameters // spec.resources.world_size)
    weights: Phase = "training" if _said(spec, f"{_ACTOR_FSDP}.param_offload", False) else "both"
    moments: Phase = "training" if _said(spec, f"{_ACTOR_FSDP}.optimizer_offload", False) else "both"
    return [
        Part(role="actor", what="weights (float32)", phase=weights, bytes=4 * share),
        Part(role="actor", what="gradients (float32)", phase="training", bytes=4 * share),
        Part(role="actor", what="Adam's moments (float32)", phase=moments, bytes=8 * share),
    ]


def _working(spec: RunSpec, model: Architecture) -> list[Part]:
    """What exists while a micro-batch is at work."""
    tokens = micro_batch_tokens(spec)
    layers_of_reference = 2 * 2 * model.layer_parameters + 2 * model.outer_parameters
    return [
        Part(role="actor", what="gathered weights (bfloat16)", phase="training", bytes=_gathered(model)),
        Part(role="actor", what="activations", phase="training", bytes=tokens * activation_bytes(spec, model)),
        Part(role="actor", what="logits", phase="training", bytes=tokens * logit_bytes(spec) * model.vocabulary),
        Part(
            role="reference", what="layers passing through", phase="training", bytes=_exact(spec, layers_of_reference)
        ),
        Part(role="all", what="CUDA, NCCL, allocator", phase="both", bytes=FIXED_BYTES),
    ]


def _gathered(model: Architecture) -> int:
    """bfloat16: embedding and head, two layers (one is fetched ahead), and the gradients of head and one layer."""
    return 2 * (2 * model.outer_parameters + 3 * model.layer_parameters)


def _exact(spec: RunSpec, count: int) -> int:
    """Of the reference beside the actor's own peak: only a KL over the vocabulary has both models at work at once."""
    return count if spec.kl.is_exact else 0


def activation_bytes(spec: RunSpec, model: Architecture) -> int:
    """Per token, bfloat16.

    Kept: the input of every layer. One layer, forward and backward (twice): norms' and attention's inputs and outputs,
    8 of hidden width, keys and values, and the MLP's gate, up, activation and product. Without checkpointing all
    layers keep theirs.
    """
    layer = 2 * (8 * model.hidden + 2 * model.kv_width + 4 * model.intermediate)
    if not _said(spec, f"{_MODEL}.enable_gradient_checkpointing", True):
        return (model.layers + 1) * layer
    return model.layers * 2 * model.hidden + 2 * layer


def logit_bytes(spec: RunSpec) -> int:
    """Per token and word of the vocabulary.

    2 logits, 2 their gradient, 2 a copy in bfloat16 for entropy and loss; 2 more where a temperature divides them; a KL
    over the vocabulary has the reference's logits (2) and a float32 gradient (4) too.
    """
    scaled = 2 if spec.train.temperature != 1 else 0
    return 6 + scaled + (6 if spec.kl.is_exact else 0)


def _engine(spec: RunSpec, model: Architecture, gpu: GPU) -> list[Part]:
    """vLLM's share, whose rest is the key-value cache."""
    share, weights = int(utilization(spec) * gpu.memory_bytes), _vllm_weights(spec, model)
    cache = max(0, share - weights - VLLM_WORKSPACE_BYTES)
    return [
        Part(role="rollout", what="weights (bfloat16)", phase="rollout", bytes=weights),
        Part(role="rollout", what="workspace", phase="rollout", bytes=VLLM_WORKSPACE_BYTES),
        Part(role="rollout", what="key-value cache", phase="rollout", bytes=cache),
    ]


def _vllm_weights(spec: RunSpec, model: Architecture) -> int:
    return 2 * model.parameters // spec.resources.tensor_parallel


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
    """A key of the recipe's `verl` block, else verl's default."""
    return spec.verl.get(key, otherwise)


def _longest(spec: RunSpec) -> int:
    return spec.train.max_prompt_tokens + spec.train.max_response_tokens


def _responses(spec: RunSpec) -> int:
    return spec.train.prompts_per_step * spec.train.responses_per_prompt


def _problems(
    spec: RunSpec, gpu: GPU, model: Architecture, parts: Sequence[Part], kv: int, kv_tokens: int
) -> Iterable[str]:
    room = int(MARGIN * gpu.memory_bytes)
    for phase in ("training", "rollout"):
        needed = _peak(parts, phase)
        if needed > room:
            yield _too_much(phase, needed, room, gpu, [part for part in parts if part.phase in (phase, "both")])
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
        said = f"arithmetic: every response at its longest, {MFU:.0%} of peak, {DECODE_BANDWIDTH:.0%} of bandwidth"
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
    kv = int(utilization(spec) * gpu.memory_bytes) - _vllm_weights(spec, model) - VLLM_WORKSPACE_BYTES
    room = max(1, kv * parallel // model.kv_bytes // _longest(spec))
    at_once = min(per_engine, _max_sequences(spec), room)
    context = spec.train.max_prompt_tokens + spec.train.max_response_tokens / 2
    read = (2 * model.parameters + at_once * context * model.kv_bytes) / parallel
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
    """The layout of fewest GPU-hours that fits, up to eight nodes; None where none does.

    Engines are as small as fits: what a larger one costs in communication is not in the arithmetic.
    """
    found = [_smallest_engine(spec, model, gpu, measured, sizes) for sizes in layouts(8 * per_node, per_node)]
    return min((one for one in found if one is not None), key=_cost, default=None)


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
        f"of {room:.1f} GiB; host {one.host_bytes / GIB:.1f} GiB a node for the reference",
        f"{one.tokens_per_step:,} tokens a step at most, {one.micro_batch_tokens:,} a micro-batch; an engine's cache "
        f"holds {one.kv_tokens:,} tokens, {one.sequences} sequences of full length",
        f"step {one.time.seconds:.1f} s ({one.time.said})",
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


def require(found: RecipeFit) -> None:
    """Refuse what cannot fit. Raises ValueError with the numbers and, where there is one, a layout that fits."""
    if not found.problems:
        return
    run, problems = next(iter(found.problems.items()))
    best = found.cheapest[run]
    way = (
        f"It would fit on {layout_in_words(best.resources)} (resources.nodes={best.resources.nodes} "
        f"resources.gpus_per_node={best.resources.gpus_per_node} "
        f"resources.tensor_parallel={best.resources.tensor_parallel})."
        if best is not None
        else "No layout of up to 8 nodes fits: shorten train.max_response_tokens or set train.micro_batch."
    )
    raise ValueError(f"{run} does not fit {layout_in_words(found.runs[run].resources)}. {' '.join(problems)} {way}")
