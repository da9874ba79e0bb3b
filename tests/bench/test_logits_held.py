"""What verl's own functions hold of logits, against what `klreg plan` counts (tests/test_fit.py has the arithmetic).

The CPU's allocator counts, so this is a measurement and no test: kernels of some processors take buffers for
themselves, with which 2.0 bytes became 2.35 on one of Intel's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_fit import EXACT, PROBED, R1, TRAIN, run, said
from verl_stack import environment, need_stack

from klreg_verl.experiment import fit


@pytest.fixture(scope="module")
def counted() -> dict[tuple[bool, float, str], float]:
    """(packed, temperature, what) -> most bytes per token and word, of verl's own functions."""
    need_stack()
    script = Path(__file__).with_name("logits_process.py")
    command, variables = [sys.executable, str(script)], environment(VERL_PLATFORM="cpu")
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("[[")]
    return {(packed, heat, what): size for packed, heat, what, size in json.loads(lines[-1])}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_verls_functions_hold_as_much_as_is_counted(
    counted: dict, monkeypatch: pytest.MonkeyPatch, packed: bool, temperature: float
):
    words = 1024 * 4096
    monkeypatch.setattr(fit, "BLOCK_ELEMENTS", 8 * 4096)  # as logits_process.py
    model = replace(R1, vocabulary=4096)
    train = replace(TRAIN, temperature=temperature, max_prompt_tokens=256, max_response_tokens=256, micro_batch=2)
    # its entropy is not compiled
    verl = said(model__use_remove_padding=packed, actor__fsdp_config__use_torch_compile=False)
    expected = {
        "entropy": fit.entropy_bytes(run(train=train, verl=verl)),
        "update": fit.logits_bytes(run(train=train, verl=verl), model) / words,
        "probe": fit.logits_bytes(run(train=train, verl=verl, probes=PROBED), model) / words,
        "full_reverse": fit.logits_bytes(run(train=train, verl=verl, kl=EXACT), model) / words,
    }
    found = {what: counted[packed, temperature, what] for what in expected}
    assert found == pytest.approx(expected, abs=0.07)  # beside them two buffers of 8 rows in 1024, 4 B each: 0.06
