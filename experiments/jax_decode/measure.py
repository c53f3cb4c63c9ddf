"""Decode attention from JAX: python -m experiments.jax_decode.measure OUT_FOLDER [--small]

Batch 64 x 4,096 tokens, pages of 16, 32 query and 8 KV heads of 128, bfloat16, a shuffled page table. Measured are: our
Pallas kernel under several launch configurations, XLA, and our backends, called from torch and from jitted JAX; what a
call from JAX adds, at a batch where the kernel takes next to nothing; what sharing costs. Every output is checked
against float64 before it is timed. --small: a few tokens, for a machine without a GPU.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from experiments.jax_decode.rows import publish
from experiments.jax_decode.scene import DIM, KV_HEADS, PAGE_SIZE, Scene
from fa_research import backends
from fa_research.attention.call import AttentionCall
from fa_research.backends import BackendSettings
from fa_research.interop.dlpack import HandleCache, import_jax, to_jax, to_torch
from fa_research.interop.jax import paged_attention as from_jax
from fa_research.masks import Causal
from fa_research.tracking import Row, Status
from fa_research.tracking.failures import failed_row

jax = import_jax()
from fa_research.kernels.jax_paged import paged_attention as with_xla  # noqa: E402
from fa_research.kernels.pallas_decode import Config, paged_decode  # noqa: E402

CHAIN, LONGER = 16, 64  # calls after one another, the host ahead of the device
ROUNDS = 9
CONFIGS = [
    Config(block_n=n, num_warps=warps, num_stages=stages, cuts=cuts)
    for n, warps, stages, cuts in (
        (128, 4, 2, 1), (128, 4, 2, 2), (128, 4, 3, 1), (128, 8, 2, 1), (64, 4, 2, 1), (64, 4, 3, 1),
        (64, 4, 4, 1), (64, 4, 3, 2), (64, 2, 3, 1), (32, 4, 4, 1), (32, 2, 4, 2),
    )
]  # fmt: skip


def microseconds(run: Callable[[], object], wait: Callable[[object], object]) -> float:
    """Until the result of `run` is there."""
    start = time.perf_counter()
    wait(run())
    return (time.perf_counter() - start) * 1e6


def wait_torch(_: object) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class Prepared:
    """One variant on one batch: its output, and as many calls after one another as are asked for."""

    out: Tensor
    chain: Callable[[int], object]
    wait: Callable[[object], object]

    def cost(self) -> tuple[float, float]:
        """Microseconds of each further call, and those that a chain costs once, however long: its start, until the
        first kernel runs, and the wait for its end. Two lengths by turns, the first two rounds not counted."""
        rounds = [
            [microseconds(lambda n=n: self.chain(n), self.wait) for n in (CHAIN, LONGER)]
            for _ in range(ROUNDS + 2)
        ][2:]
        call = median((longer - short) / (LONGER - CHAIN) for short, longer in rounds)
        return call, median(short - CHAIN * call for short, _ in rounds)


def in_torch(name: str, plan_each: bool, scene: Scene) -> Prepared:
    """Calls of a backend from torch, eager, on one plan or each on its own."""
    settings = BackendSettings(scene.q_BHD.device, scene.q_BHD.dtype, PAGE_SIZE, scene.metadata.max_seq_len_k)
    backend = backends.create(name, settings, [scene.spec])
    scene.metadata.plans.clear()
    backend.plan(scene.metadata, backend.lowerings[0])
    call = AttentionCall(scene.q_BHD, scene.k_NKD, scene.v_NKD, scene.metadata, scene.spec)

    def chain(calls: int) -> Tensor:
        q_BHD = scene.q_BHD
        for _ in range(calls):
            if plan_each:
                backend.plan(scene.metadata, backend.lowerings[0])
            q_BHD, _ = backend.attend(replace(call, q_THD=q_BHD))
        return q_BHD

    out, _ = backend.attend(call)
    return Prepared(out, chain, wait_torch)


def in_jax(attend: Callable[[dict[str, Any]], Any], scene: Scene, together: bool = False) -> Prepared:
    """Calls under jit, each on the output of the one before: a program each, which the host starts ahead of the device,
    or `together` in one program, as the layers of a model are."""
    arrays, once = scene.arrays(), jax.jit(attend)

    def programs(calls: int) -> Any:
        q = arrays["q"]
        for _ in range(calls):
            q = once(arrays | {"q": q})
        return q

    @functools.partial(jax.jit, static_argnums=1)
    def one_program(arrays: dict[str, Any], calls: int) -> Any:
        for _ in range(calls):
            arrays = arrays | {"q": attend(arrays)}
        return arrays["q"]

    chain = functools.partial(one_program, arrays) if together else programs
    return Prepared(to_torch(once(arrays)), chain, jax.block_until_ready)


def variants(interpret: bool) -> Iterator[tuple[str, Callable[[dict[str, Any]], Any]]]:
    shape = {"page_size": PAGE_SIZE, "scale": DIM**-0.5}
    for config in CONFIGS[:1] if interpret else CONFIGS:
        name = "pallas " + " ".join(f"{key}={value}" for key, value in asdict(config).items())

        def pallas(a: dict[str, Any], config: Config = config) -> Any:
            pools = (a["q"], a["k"], a["v"], 0, a["table"], a["lens"])
            return paged_decode(*pools, **shape, config=config, interpret=interpret)[0]

        yield name, pallas

    def xla(a: dict[str, Any]) -> Any:
        cu_seqlens = jax.numpy.arange(a["q"].shape[0] + 1, dtype=jax.numpy.int32)
        return with_xla(a["q"], a["k"], a["v"], 0, a["table"], a["lens"], cu_seqlens, mask=Causal(), **shape)[
            0
        ]

    yield "xla", xla
    for backend in ("torch",) if interpret else ("fa3", "triton"):
        yield f"jit {backend}", lambda a, backend=backend: through(backend, a)


def through(backend: str, a: dict[str, Any]) -> Any:
    pools = (a[name].reshape(-1, PAGE_SIZE, KV_HEADS, DIM) for name in "kv")
    return from_jax(a["q"], *pools, a["table"], a["lens"], backend=backend)


def sharing(scene: Scene) -> dict[str, float]:
    """Microseconds of sharing: a tensor, a result, and a pool that is known already."""
    cache, array = HandleCache(), to_jax(scene.q_BHD)
    cases = {
        "to_jax_us": lambda: to_jax(scene.q_BHD),
        "to_torch_us": lambda: to_torch(array),
        "handle_us": lambda: cache.get(scene.k_NKD),
    }
    return {
        name: median(microseconds(run, lambda _: None) for _ in range(200)) for name, run in cases.items()
    }


def row_of(config: dict[str, Any], prepare: Callable[[Scene], Prepared], large: Scene, little: Scene) -> Row:
    """Checked, then timed: at the large batch, and at one where the host's part is all there is to see."""
    prepared = prepare(large)
    checks = large.check(prepared.out)
    row = Row(Status.ok if checks["out_passed"] else Status.inaccurate, config, checks=checks)
    if row.status is Status.ok:
        call, once = prepared.cost()
        row.metrics = {"call_us": call, "once_us": once, "gigabytes_per_s": large.bytes_read / call / 1e3}
        if not config["variant"].startswith("pallas"):  # a kernel more or less, and long to compile
            row.metrics["call_bs1_us"], row.metrics["once_bs1_us"] = prepare(little).cost()
    return row


def measure(small: bool) -> Iterator[Row]:
    """A row a variant: what fails costs its own row only."""
    device = torch.device("cpu") if small else torch.device("cuda", 0)
    dtype = torch.float32 if small else torch.bfloat16
    large, little = (Scene.make(device, dtype, *size) for size in ((2, 64) if small else (64, 4096), (1, 64)))
    cases: list[tuple[str, Callable[[Scene], Prepared]]] = [
        (f"torch {name}{', planned each time' * each}", functools.partial(in_torch, name, each))
        for name in (("torch",) if small else ("fa3", "triton"))
        for each in (False, True)
    ]
    for name, attend in variants(interpret=small):
        cases += [(name, functools.partial(in_jax, attend))]
        if name.startswith("jit"):
            cases += [(f"{name}, one program", functools.partial(in_jax, attend, together=True))]
    for name, prepare in cases:
        config = {
            "variant": name,
            "batch_size": large.q_BHD.shape[0],
            "seq_len": large.metadata.max_seq_len_k,
        }
        try:
            yield row_of(config, prepare, large, little)
        except Exception as error:  # the next variant may still work
            yield failed_row(error, config)
    yield Row(Status.ok, {"variant": "sharing"}, metrics=sharing(large))


if __name__ == "__main__":
    publish(measure)
