"""`make bench`: the fused pass against two whole log-softmaxes, at a real vocabulary. Prints; asserts nothing timed.

Each turn runs both, one after the other in one process, so that a busy machine slows both. CPU time is user and system
time of all threads. Run as a file with `memory NAME` or `errors` it is the fresh process that these need.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from klreg_verl.core.fused import logprob_statistics

ROOT = Path(__file__).resolve().parents[2]
TOKENS, WIDTH, VOCABULARY = 512, 1536, 151936
ROWS_IN_FLOAT64 = 64
TURNS = 5
OUTPUTS = ("logprobs", "entropy", "reverse", "forward")
Outputs = tuple[Tensor, ...]


def fused(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, tokens: Tensor) -> Outputs:
    """Log-prob, entropy, reverse and forward KL of each token, by chunks of the vocabulary."""
    found = logprob_statistics(hidden, weight, ref_hidden, ref_weight, tokens)
    return tuple(getattr(found, name) for name in OUTPUTS)


def straightforward(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, tokens: Tensor) -> Outputs:
    """The same numbers by autograd on whole log-softmaxes."""
    logprobs = (hidden @ weight.t()).log_softmax(dim=-1)
    with torch.no_grad():
        ref_logprobs = (ref_hidden @ ref_weight.t()).log_softmax(dim=-1)
        ref_probabilities = ref_logprobs.exp()
    probabilities = logprobs.exp()
    return (
        logprobs.gather(1, tokens.unsqueeze(-1)).squeeze(-1),
        -(probabilities * logprobs).sum(dim=-1),
        (probabilities * (logprobs - ref_logprobs)).sum(dim=-1),
        (ref_probabilities * (ref_logprobs - logprobs)).sum(dim=-1),
    )


PASSES: dict[str, Callable[..., Outputs]] = {"fused": fused, "straightforward": straightforward}


def test_time_turn_by_turn():
    given, upstream = problem()
    for what, backward, target in (("forward", False, 0.75), ("forward and backward", True, 1.2)):
        seconds: dict[str, list[float]] = {name: [] for name in PASSES}
        for turn in range(TURNS + 1):
            for name in PASSES if turn % 2 else reversed(PASSES):
                seconds[name].append(cpu_seconds(PASSES[name], given, upstream, backward))
        print(f"\n{what}: CPU seconds, T={TOKENS} H={WIDTH} V={VOCABULARY}, {torch.get_num_threads()} threads")
        for name, found in seconds.items():
            print(f"  {name:<24} {spread(found[1:])}")
        ratios = [one / other for one, other in zip(*(found[1:] for found in seconds.values()), strict=True)]
        print(f"  {'fused / straightforward':<24} {spread(ratios)}  (target {target})")


def test_peak_memory():
    peaks = {name: in_a_fresh_process("memory", name) for name in PASSES}
    print("\npeak memory of forward and backward beyond inputs and their gradients")
    for name, peak in peaks.items():
        print(f"  {name:<24} {peak / 1e6:8.1f} MB")
    print(f"  straightforward / fused  {peaks['straightforward'] / peaks['fused']:8.1f}     (target 50)")


def test_errors():
    print(f"\nlargest error against float64, {ROWS_IN_FLOAT64} tokens (target 1e-5)")
    for what, error in in_a_fresh_process("errors").items():
        print(f"  {what:<24} {error:.1e}")


def problem() -> tuple[dict[str, Tensor], Tensor]:
    """(inputs, upstream gradients (4, T)): logits with a standard deviation near 4, a KL of some tenths of a nat."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).mul_(0.1)
    given = {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "ref_hidden": hidden.detach() + 0.2 * torch.randn(TOKENS, WIDTH, generator=generator),
        "ref_weight": weight.detach(),
        "tokens": torch.randint(0, VOCABULARY, (TOKENS,), generator=generator),
    }
    return given, torch.randn(len(OUTPUTS), TOKENS, generator=generator)


def gradients(outputs: Outputs, upstream: Tensor, given: dict[str, Tensor]) -> Outputs:
    """Of the outputs' sum weighted with `upstream`, to the hidden states and the weights of the policy."""
    return torch.autograd.grad(outputs, [given["hidden"], given["weight"]], list(upstream.to(outputs[0].dtype)))


def cpu_seconds(run: Callable[..., Outputs], given: dict[str, Tensor], upstream: Tensor, backward: bool) -> float:
    """User and system time of one pass."""
    begun = time.process_time()
    with torch.set_grad_enabled(backward):
        outputs = run(**given)
    if backward:
        gradients(outputs, upstream, given)
    return time.process_time() - begun


def spread(values: list[float]) -> str:
    """Median, and the quartiles around it."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}] n={len(values)}"


def in_a_fresh_process(*arguments: str):
    """What this file prints as its last line when run with `arguments`."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory(name: str) -> int:
    """Bytes of resident memory, at the highest, beyond what was there before and the two gradients."""
    given, upstream = problem()
    small = {key: one[:64].detach().requires_grad_(key in ("hidden", "weight")) for key, one in given.items()}
    small["tokens"] = small["tokens"].detach() % 64
    gradients(PASSES[name](**small), upstream[:, :64], small)  # libraries and thread pools are loaded
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident("VmRSS")
    found = gradients(PASSES[name](**given), upstream, given)
    return resident("VmHWM") - before - sum(one.nbytes for one in found)


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def errors() -> dict[str, float]:
    """Largest difference of each output (in nats) and gradient (over its largest entry) from float64."""
    given, upstream = problem()
    rows = {name: one[:ROWS_IN_FLOAT64] if len(one) == TOKENS else one for name, one in given.items()}
    learned = {name: rows[name].detach().requires_grad_() for name in ("hidden", "weight")}
    rows, upstream = rows | learned, upstream[:, :ROWS_IN_FLOAT64]
    outputs = fused(**rows)
    found = gradients(outputs, upstream, rows)
    weight = rows["weight"].detach().double().requires_grad_()
    wide = {name: one if name == "tokens" else one.detach().double() for name, one in rows.items() if "w" not in name}
    wide |= {"hidden": wide["hidden"].requires_grad_(), "weight": weight, "ref_weight": weight.detach()}
    exact = straightforward(**wide)
    differences = {name: largest(one - other) for name, one, other in zip(OUTPUTS, outputs, exact, strict=True)}
    for name, one, other in zip(learned, found, gradients(exact, upstream, wide), strict=True):
        differences[f"gradient of {name}"] = largest(one - other) / largest(other)
    return differences


def largest(values: Tensor) -> float:
    """The largest absolute value."""
    return values.abs().max().item()


if __name__ == "__main__":
    print(json.dumps(errors() if sys.argv[1] == "errors" else peak_memory(sys.argv[2])))
