"""Which kernels a call runs, and how long each takes: python -m experiments.jax_decode.profile_calls (Hopper GPU)

The same calls as `measure.py` at 64 x 4,096 tokens, from torch and from jitted JAX, as CUPTI records them.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch.profiler import ProfilerActivity, profile

from experiments.jax_decode.measure import CHAIN, Prepared, in_jax, in_torch, through, variants
from experiments.jax_decode.scene import Scene

DEFAULT = "pallas block_n=64 num_warps=4 num_stages=2 cuts=1"


def report(name: str, prepared: Prepared) -> None:
    """Kernels of one chain by total time, and how much of the chain no kernel ran."""
    for _ in range(3):
        prepared.wait(prepared.chain(CHAIN))
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        prepared.wait(prepared.chain(CHAIN))
        torch.cuda.synchronize()
    kernels = [event for event in recorded.events() if event.device_type.name == "CUDA"]
    begin = min(event.time_range.start for event in kernels)
    end = max(event.time_range.end for event in kernels)
    times: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        times[event.name].append(event.time_range.elapsed_us())
    busy, covered = 0.0, begin  # kernels may overlap
    for event in sorted(kernels, key=lambda event: event.time_range.start):
        busy += max(0.0, event.time_range.end - max(event.time_range.start, covered))
        covered = max(covered, event.time_range.end)
    print(f"{name}: {(end - begin) / CHAIN:.1f} us a call, {(end - begin - busy) / CHAIN:.1f} us idle")
    for kernel, found in sorted(times.items(), key=lambda item: -sum(item[1]))[:10]:
        print(f"    {sum(found) / CHAIN:8.2f} us a call, {len(found):4} times  {kernel[:110]}")


def main() -> None:
    scene = Scene.make(torch.device("cuda", 0), torch.bfloat16, 64, 4096)
    for name in ("fa3", "triton"):
        report(f"torch {name}", in_torch(name, False, scene))
        report(f"torch {name}, planned each time", in_torch(name, True, scene))
        for together in (False, True):
            prepared = in_jax(lambda a, name=name: through(name, a), scene, together)
            report(f"jit {name}{', one program' * together}", prepared)
    attend = dict(variants(interpret=False))[DEFAULT]
    report(f"jit {DEFAULT}", in_jax(attend, scene))  # what two programs cost where nothing of ours is called


if __name__ == "__main__":
    main()
