"""What the self-test makes of its numbers; that they are right on a GPU is in tests/gpu."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fa_research.config import TimerKind
from fa_research.errors import TimingError
from fa_research.measure import self_test as module
from fa_research.measure.self_test import cannot, judge, self_test

GOOD = {
    "self_test_events_rate": 1.001, "self_test_events_noop_us": 2.3, "self_test_events_graph_rate": 0.999,
    "self_test_events_graph_noop_us": 5.0, "self_test_host_ratio": 1.01, "self_test_cold_over_warm": 2.4,
}  # fmt: skip


def test_good_numbers_pass() -> None:
    assert judge(GOOD) == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("self_test_events_rate", 1.05),
        ("self_test_events_rate", 0.9),
        ("self_test_events_rate", float("nan")),
        ("self_test_events_graph_rate", 0.0),
        ("self_test_events_noop_us", -1.0),
        ("self_test_events_graph_noop_us", 400.0),
        ("self_test_host_ratio", 2.0),
        ("self_test_cold_over_warm", 1.01),
        ("self_test_cold_over_warm", float("nan")),
        ("self_test_cold_over_warm", float("inf")),
    ],
)
def test_each_bad_one_is_named(name: str, value: float) -> None:
    (problem,) = judge(GOOD | {name: value})
    assert problem.startswith(f"{name}=")


@pytest.mark.parametrize("bad", [0, 1, 2, 3])
def test_attempts_that_failed_are_told(bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = [GOOD | {"self_test_host_ratio": 2.0}] * bad + [GOOD]
    monkeypatch.setattr(module, "_attempt", lambda *_: attempts.pop(0))
    self_test.cache_clear()
    try:
        if bad == 3:
            with pytest.raises(TimingError, match=r"self_test_host_ratio=2\.0.*measure\.self_test=false"):
                self_test(torch.device("cpu"), TimerKind.events)
            return
        told = {"self_test_attempts": bad + 1.0} if bad else {}
        assert self_test(torch.device("cpu"), TimerKind.events) == GOOD | told
    finally:
        self_test.cache_clear()


def test_where_it_cannot_run_why_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cannot() is None
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "triton" in str(cannot())


COMPILE = r"""
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fa_research.kernels import clock

def ptx(kernel, **signature):
    source = ASTSource(fn=kernel, signature=signature, constexprs={})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm["ptx"]

hold = ptx(clock.hold_kernel, took_ptr="*i64", nanoseconds="i32")
assert re.search(r"%globaltimer;.*\n(.*\n)*?.*%globaltimer;(.*\n)*?.*bra", hold)  # read again in the loop
chase = ptx(clock.chase_kernel, next_ptr="*i64", took_ptr="*i64", end_ptr="*i64", steps="i32")
assert re.search(r"ld\.global\.b64 \{ (%rd\d+) \}", chase) and chase.count("mov.u64 %rd") >= 2
print("compiled")
"""


def test_its_kernels_compile_for_hopper() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "compiled"
