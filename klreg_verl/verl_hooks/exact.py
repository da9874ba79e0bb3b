"""KL over the whole vocabulary in verl's loss: the reference runs on the micro-batch whose logits the policy just gave.

verl calls a loss function first with `student_logits` where `distillation_use_topk` is set (its seam for distillation),
puts what it returns into the model output, and calls it again for the loss. `ExactLoss` answers the first call; the
loss it wraps finds the per-token divergences in the model output, under names.EXACT and names.EXACT_REVERSE.

Every worker's reference runs once per micro-batch, and verl gives every worker equally many: FSDP's gathering agrees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils.tensordict_utils import assign_non_tensor

from klreg_verl.core import exact
from klreg_verl.core.exact import Divergence
from klreg_verl.core.logprobs import blocks
from klreg_verl.experiment.recipe import KLSpec
from klreg_verl.verl_hooks import names, terms

if TYPE_CHECKING:
    from verl.workers.engine.fsdp import FSDPEngine

Loss = Callable[..., tuple[Tensor, dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class ExactLoss:
    """A loss function of verl's that sees both models' logits first. It travels; the workers bind the reference."""

    loss: Loss
    divergence: Divergence | None = None
    """Of the loss, (..., V), (..., V) -> (...); None: the exact KL is measured only."""
    probe: bool = False
    """Whether the exact reverse KL is measured beside it."""
    reference: FSDPEngine | None = None

    def bound_to(self, reference: FSDPEngine, policy: FSDPEngine) -> ExactLoss:
        """With the reference's engine in place; ValueError where the two engines' logits would not match."""
        check_engines(policy, reference)
        return replace(self, reference=reference)

    def __call__(
        self,
        model_output: dict[str, Tensor] | None = None,
        data: TensorDict | None = None,
        dp_group: Any = None,
        student_logits: Tensor | None = None,
    ) -> Any:
        """verl's two calls: divergences {name: (1, N)} of `student_logits` (1, N, V), then (loss, metrics)."""
        if student_logits is None:
            return self.loss(model_output=model_output, data=data, dp_group=dp_group)
        if self.reference is None:
            raise RuntimeError("ExactLoss was called before KLRegWorker.set_loss_fn bound the reference to it.")
        return self.divergences(student_logits.squeeze(0), reference_logits(self.reference, data).squeeze(0))

    def divergences(self, logits: Tensor, ref_logits: Tensor) -> dict[str, Tensor]:
        """names.EXACT and names.EXACT_REVERSE -> (1, N) in nats, from logits (N, V) over the temperature."""
        found = {}
        if self.divergence is not None:
            found[names.EXACT] = per_token(self.divergence, logits, ref_logits)
        if self.probe:
            found[names.EXACT_REVERSE] = per_token(exact.full_reverse, logits.detach(), ref_logits)
        return {name: values.unsqueeze(0) for name, values in found.items()}


def with_logits(loss: Loss, kl: KLSpec, *, probe: bool = False) -> Loss:
    """`loss` as it is to be sent to the workers: wrapped where the estimator, or the probe, needs the logits."""
    if not kl.is_exact and not probe:
        return loss
    return ExactLoss(loss=loss, divergence=terms.divergence_of(kl) if kl.is_exact else None, probe=probe)


def per_token(divergence: Divergence, logits: Tensor, ref_logits: Tensor) -> Tensor:
    """(N,) divergences of (N, V) logits, some tokens at a time; the gradient flows to `logits` only.

    The gradient is taken here, in the forward pass, and kept in the logits' dtype. So the reference's logits can be
    freed at once, and flash-attention's cross-entropy may overwrite the policy's in its backward pass, as verl lets it.
    """
    if logits.shape != ref_logits.shape:
        raise ValueError(f"The policy gave logits {tuple(logits.shape)}, the reference {tuple(ref_logits.shape)}.")
    return _PerToken.apply(logits, ref_logits, divergence)


class _PerToken(torch.autograd.Function):
    """Rows are independent, so the gradient of the sum over rows holds each row's own."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ref_logits: Tensor, divergence: Divergence) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits) if wanted else None
        values = [
            _values(divergence, logits[rows], ref_logits[rows], None if gradient is None else gradient[rows])
            for rows in blocks(*logits.shape)
        ]
        if wanted:
            ctx.save_for_backward(gradient)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        scaled = torch.empty_like(gradient)
        for rows in blocks(*gradient.shape):
            scaled[rows] = gradient[rows] * upstream[rows].unsqueeze(-1)  # beta is in upstream, unrounded
        return scaled, None, None


def _values(divergence: Divergence, logits: Tensor, ref_logits: Tensor, gradient: Tensor | None) -> Tensor:
    """The divergence of each row; its gradient is written to `gradient`, if given."""
    if gradient is None:
        return divergence(logits.detach(), ref_logits)
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        values = divergence(leaf, ref_logits)
        gradient.copy_(torch.autograd.grad(values.sum(), leaf)[0])
    return values.detach()


def reference_logits(engine: FSDPEngine, data: TensorDict) -> Tensor:
    """(1, N, V): the reference's logits on verl's micro-batch, packed and over the temperature as the policy's."""
    taken: list[Tensor] = []

    def take(student_logits: Tensor | None = None, **_: Any) -> Any:
        if student_logits is None:
            return torch.zeros(()), {}
        taken.append(student_logits)
        return {}

    batch = data.copy()  # the tensors are shared, the flags are ours
    only_logits = {"calculate_entropy": False, "calculate_sum_pi_squared": False, "distillation_only": True}
    assign_non_tensor(batch, distillation_use_topk=True, **only_logits)
    with torch.no_grad(), engine.eval_mode(disable_auto_offload=True):
        engine.forward_step(batch, loss_function=take, forward_only=True)
    return taken[0]


def check_engines(policy: Any, reference: Any) -> None:
    """ValueError where verl would not hand over logits, or not the same rows of both models."""
    from verl.workers.engine.fsdp import FSDPEngine  # a worker has it, the driver does without

    if not isinstance(policy, FSDPEngine) or not isinstance(reference, FSDPEngine):
        raise ValueError(f"{_NEEDS} FSDP, not {type(policy).__name__} and {type(reference).__name__}.")
    if policy.engine_config.use_fused_kernels:
        raise ValueError(f"{_NEEDS} the logits, which verl's fused kernels never make. Set use_fused_kernels=False.")
    if policy.pad_to_length or reference.pad_to_length:
        raise ValueError(f"{_NEEDS} pad_to_length=False: verl does not give both logits and padding.")
    sizes = [engine.ulysses_sequence_parallel_size for engine in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{_NEEDS} the same ulysses_sequence_parallel_size of actor and reference, not {sizes}.")


_NEEDS = "A KL over the vocabulary (full_*, topk_*, or the probe kl_ref/exact_token) needs"
