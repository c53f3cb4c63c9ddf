"""The fastest block sizes of the experts' two products, for the shapes and batch sizes of measure.py.

Run on a Hopper GPU: python experiments/moe_layer/tune.py [MODEL ...]
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from measure import BATCHES, DEVICE, DTYPE, MODELS, Paths, build, config_of, interleave
from torch import Tensor

from fa_research.config import ModelConfig
from fa_research.kernels import moe as kernels
from fa_research.kernels.common import is_hopper
from fa_research.kernels.moe import Tiles, choose_tiles
from fa_research.models.moe import MoE


def run_tiles(layers: list[MoE], x_TE: Tensor, tiles: tuple[Tiles, Tiles]) -> None:
    for layer in layers:
        logits = F.linear(x_TE, layer.router, layer.router_bias)
        call_kernels(layer, x_TE, logits, tiles)


def call_kernels(layer: MoE, x_TE: Tensor, logits_TN: Tensor, tiles: tuple[Tiles, Tiles]) -> Tensor:
    return kernels.moe(
        x_TE, logits_TN, layer.gate_up, layer.gate_up_bias, layer.down, layer.down_bias, tiles=tiles,
        activation=layer.activation, experts_per_token=layer.experts_per_token, renormalise=layer.renormalise,
    )  # fmt: skip


def candidates(tokens_per_expert: float) -> list[Tiles]:
    if tokens_per_expert <= 48:
        block_m = (16, 32) if tokens_per_expert > 4 else (16,)
        shapes = [(32, 128, 4, 4), (64, 64, 4, 4), (64, 64, 4, 6), (64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 4),
                  (128, 128, 4, 3), (128, 64, 8, 4), (32, 256, 4, 3)]  # fmt: skip
        found = [Tiles(m, *shape) for m, shape in itertools.product(block_m, shapes)]
        return found + [replace(tiles, swap=True) for tiles in found if tiles.block_n >= 64]
    shapes = [(64, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 128, 64, 8, 3), (128, 64, 64, 4, 4), (128, 64, 64, 8, 4),
              (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (64, 256, 64, 8, 3)]  # fmt: skip
    return [Tiles(*shape) for shape in shapes]


def average(config: ModelConfig, tokens: int) -> float:
    return tokens * config.moe.experts_per_token / config.moe.num_experts


def compile_share(model: str, share: list[Tiles]) -> None:
    """Fill Triton's cache on disk: in processes of its own, as compiling is what takes the time."""
    config = config_of(model)
    layer = MoE(config, dtype=DTYPE, device=DEVICE)
    x_TE = torch.zeros(1, config.hidden_size, dtype=DTYPE, device=DEVICE)
    for tiles in share:
        try_tiles([layer], x_TE, (tiles, tiles))
    torch.cuda.synchronize()


def try_tiles(layers: list[MoE], x_TE: Tensor, tiles: tuple[Tiles, Tiles]) -> bool:
    """Whether both fit the GPU's shared memory and registers."""
    from triton.runtime.errors import OutOfResources

    try:
        run_tiles(layers[:1], x_TE, tiles)
    except OutOfResources:
        return False
    return True


def compile_all(models: list[str]) -> None:
    context = torch.multiprocessing.get_context("spawn")
    workers = []
    for model in models:
        config = config_of(model)
        all_tiles = {t: None for tokens in BATCHES for t in candidates(average(config, tokens))}
        for first in range(6):
            workers.append(context.Process(target=compile_share, args=(model, list(all_tiles)[first::6])))
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def tune(model: str) -> None:
    """The fastest first and second product of each batch size, each with the other as it is chosen today."""
    config = config_of(model)
    layers = build(config)
    for tokens in BATCHES:
        x_TE = torch.randn(tokens, config.hidden_size, dtype=DTYPE, device=DEVICE)
        pairs, count = tokens * config.moe.experts_per_token, config.moe.num_experts
        inner = layers[0].down.shape[2]
        now = [
            choose_tiles(pairs, count, inner, gated, DTYPE.itemsize, is_hopper(DEVICE))
            for gated in (True, False)
        ]
        paths: Paths = {"now": partial(run_tiles, layers, x_TE, (now[0], now[1]))}
        for tiles in candidates(average(config, tokens)):
            for which, pair in (("first", (tiles, now[1])), ("second", (now[0], tiles))):
                if try_tiles(layers, x_TE, pair):
                    paths[f"{which} {as_text(tiles)}"] = partial(run_tiles, layers, x_TE, pair)
        times = {name: median(values) for name, values in interleave(paths, rounds=9).items()}
        print(
            f"{model} {tokens} tokens: now {times['now']:.1f} us with {as_text(now[0])} and {as_text(now[1])}"
        )
        for which in ("first", "second"):
            best = sorted((us, name) for name, us in times.items() if name.startswith(which))
            print("   " + "; ".join(f"{name} {us:.1f}" for us, name in best[:4]), flush=True)


def as_text(tiles: Tiles) -> str:
    swap = " swap" if tiles.swap else ""
    return f"{tiles.block_m}x{tiles.block_n}x{tiles.block_k} w{tiles.num_warps} s{tiles.num_stages}{swap}"


@torch.no_grad()
def main(models: list[str]) -> None:
    torch.manual_seed(0)
    compile_all(models)
    for model in models:
        tune(model)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1:] or list(MODELS))
