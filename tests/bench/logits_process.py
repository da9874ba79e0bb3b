"""What verl's forward_step and its backward pass hold of logits, counted by the CPU's allocator, as JSON.

`python logits_process.py`, for test_logits_held.py. The model is an output head alone. Two things are not a CPU's:
autocast's float32 softmax and logsumexp, and flash-attn's cross-entropy, which writes its gradient over the logits.
They stand here as CUDA has them; everything else is verl's and ours.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from klreg_verl.core import exact as divergences
from klreg_verl.core import logprobs
from klreg_verl.verl_hooks import names
from klreg_verl.verl_hooks.exact import ExactLoss

TOKENS, WORDS, WIDTH, ROWS = 1024, 4096, 8, 8
"""Of a micro-batch of two sequences; the head's width; rows of a block."""


class Written(torch.autograd.Function):
    """flash_attn.ops.triton.cross_entropy with inplace_backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        with torch.no_grad():
            return logprobs.in_blocks(logits, tokens)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        return logits.mul_(0.5), None


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WORDS, WIDTH, dtype=torch.bfloat16))

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        hidden = torch.randn(*input_ids.shape, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        return SimpleNamespace(logits=nn.functional.linear(hidden, self.weight))


def entropy(logits: Tensor) -> Tensor:
    """verl's entropy_from_logits under CUDA's autocast (torch/include/ATen/autocast_mode.h, AT_FORALL_FP32)."""
    pd = nn.functional.softmax(logits, dim=-1, dtype=torch.float32)
    return torch.logsumexp(logits.float(), dim=-1) - torch.sum(pd * logits, dim=-1)


def engine(module: Any, batch: tuple[dict[str, Any], dict[str, Any]]) -> Any:
    """As much of verl's FSDPEngineWithLMHead as forward_step needs."""
    settings = SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False)
    found = SimpleNamespace(module=Head(), engine_config=settings, compute_entropy_from_logits=entropy)
    found._gather_and_unpad_packed = lambda values, pad: values
    found.get_data_parallel_group = lambda: None
    found.prepare_model_inputs = lambda micro_batch: batch
    found.eval_mode = lambda **_: contextlib.nullcontext()
    found._autocast_dtype = torch.float32  # the stand-ins above are what autocast would do
    for name in ("prepare_model_outputs", "forward_step"):
        setattr(found, name, MethodType(getattr(module.FSDPEngineWithLMHead, name), found))
    return found


def inputs(packed: bool, temperature: float, ids: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """What prepare_model_inputs returns: the model's, and what goes on to prepare_model_outputs."""
    told = {"input_ids_rmpad_rolled": ids.values().roll(-1, 0), "temperature_is_one": temperature == 1, "pad_size": 0}
    told["temperature"] = torch.full((2,), temperature)
    told["temperature_rmpad"] = torch.full((TOKENS,), temperature)
    shown = ids.values().unsqueeze(0) if packed else torch.nested.to_padded_tensor(ids, 0)
    return {"input_ids": shown}, told


def loss(model_output: Any, data: Any, dp_group: Any) -> tuple[Tensor, dict[str, Any]]:
    extra = model_output[names.EXACT].values().sum() if names.EXACT in model_output else 0.0
    return model_output["log_probs"].values().sum() + extra, {}


def peak(module: Any, packed: bool, temperature: float, what: str) -> float:
    """Most bytes per token and word at one time; `what`: entropy, update, probe, or the name of a KL in the loss."""
    ids = torch.nested.nested_tensor([torch.randint(0, WORDS, (TOKENS // 2,))] * 2, layout=torch.jagged)
    given = inputs(packed, temperature, ids)
    policy, reference = engine(module, given), engine(module, given)
    flags = {"use_remove_padding": packed, "calculate_entropy": what == "entropy"}
    used: Any = None if what == "entropy" else loss
    if what not in ("entropy", "update"):
        divergence = None if what == "probe" else divergences.divergence(what)
        used = ExactLoss(loss=loss, divergence=divergence, probe=what == "probe", reference=reference)
        flags["distillation_use_topk"] = True
    batch = TensorDict({"input_ids": ids}, batch_size=[2])
    module.tu.assign_non_tensor(batch, pad_mode=module.DatasetPadMode.NO_PADDING, **flags)
    module.logprobs_from_logits = lambda logits, labels, **_: (Written.apply if packed else logprobs.in_blocks)(
        logits, labels
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen, record_function("all"):
        with torch.no_grad() if used is None else contextlib.nullcontext():
            value, _ = policy.forward_step(batch, used, used is None)
        if used is not None:
            value.backward()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(sizes)) / (TOKENS * WORDS)


def main() -> None:
    from verl.workers.engine.fsdp import transformer_impl as module

    logprobs.BLOCK_ELEMENTS = ROWS * WORDS
    module.verl_F.entropy_from_logits = entropy
    module.get_device_id = module.get_device_name = lambda: "cpu"
    cases = itertools.product((False, True), (0.6, 1.0), ("entropy", "update", "probe", "full_reverse"))
    found = [[packed, heat, what, peak(module, packed, heat, what)] for packed, heat, what in cases]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
