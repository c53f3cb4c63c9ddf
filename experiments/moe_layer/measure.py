"""One layer's mixture of experts against the time that reading its experts takes: our Triton kernels and torch's
grouped_mm side by side.

Run on a Hopper GPU: python experiments/moe_layer/measure.py OUT_FOLDER [MODEL ...]
Each path is a CUDA graph of four layers with weights of their own, which outgrow L2; paths take turns in random order,
and each is checked against float64 before it is timed.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor

from fa_research.config import ModelConfig, load_config
from fa_research.config.store import CONFIG_DIR, register
from fa_research.kernels.common import is_hopper
from fa_research.kernels.moe import choose_tiles
from fa_research.measure.numerics import Verdict, judge_rows
from fa_research.measure.roofline import measure_roof
from fa_research.models.moe import MoE, route
from fa_research.tracking import Row, RowWriter, Status, environment

MODELS = ("qwen3_30b_a3b", "gpt_oss_20b", "mixtral_8x7b")
BATCHES = (1, 16, 64, 4096)
LAYERS, ROUNDS, CHECKED = 4, 25, 64
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
COLD_BYTES = 256 << 20
Paths = dict[str, Callable[[], object]]


def config_of(model: str) -> ModelConfig:
    register()
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        return load_config(compose("config", [f"model={model}"])).model


def build(config: ModelConfig) -> list[MoE]:
    layers = [MoE(config, dtype=DTYPE, device=DEVICE) for _ in range(LAYERS)]
    for layer in layers:
        for weight in layer.parameters():
            weight.normal_(std=0.02)
        layer.router.normal_()  # decided routing: near ties are not what is to be measured
    return layers


def check(layer: MoE, x_TE: Tensor, path: str) -> Verdict:
    """Some tokens against float64, and against every expert in plain torch. The logits are given: where two of them are
    equal in bf16 at the border of the chosen, both choices are right, and such tokens are left out."""
    logits = F.linear(x_TE, layer.router, layer.router_bias)
    result = layer.experts(x_TE, logits, path)
    top = logits.float().topk(layer.experts_per_token + 1).values
    rows = (top[:, -1] < top[:, -2]).nonzero()[:CHECKED, 0]
    x, logits = x_TE[rows], logits[rows]
    baseline = layer.experts(x, logits, "dense")
    kept = [(parameter, parameter.data) for parameter in layer.parameters()]
    for parameter, data in kept:
        parameter.data = data.double()
    reference = layer.experts(x.double(), logits.double(), "dense")
    for parameter, data in kept:
        parameter.data = data
    verdict = judge_rows([(result[rows], baseline, reference)])
    assert verdict.passed, (path, verdict)
    return verdict


def bytes_read(layers: list[MoE], x_TE: Tensor) -> tuple[float, float]:
    """Bytes of the experts that are hit and how many these are, as means over the layers."""
    hit = [
        route(F.linear(x_TE, layer.router, layer.router_bias), layer.experts_per_token, True)[1]
        .unique()
        .numel()
        for layer in layers
    ]
    mean = sum(hit) / len(hit)
    return mean * (layers[0].gate_up[0].nbytes + layers[0].down[0].nbytes), mean


def run_path(layers: list[MoE], x_TE: Tensor, path: str) -> None:
    for layer in layers:
        layer.experts(x_TE, F.linear(x_TE, layer.router, layer.router_bias), path)


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def interleave(paths: Paths, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Microseconds per layer of each path, in rounds of random order; the first two rounds are dropped."""
    graphs = {name: capture(run) for name, run in paths.items()}
    flush = torch.empty(COLD_BYTES, dtype=torch.int8, device=DEVICE)
    events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
    order, rng = list(graphs), random.Random(0)
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            graphs[name].replay()
            end.record()
            events.append((name, start, end))
    torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for name, start, end in events:
        samples[name].append(start.elapsed_time(end) * 1e3 / LAYERS)
    return {name: values[2:] for name, values in samples.items()}


def run_cell(model: str, layers: list[MoE], tokens: int, writer: RowWriter) -> None:
    config = config_of(model)
    x_TE = torch.randn(tokens, config.hidden_size, dtype=DTYPE, device=DEVICE)
    paths: Paths = {path: partial(run_path, layers, x_TE, path) for path in ("triton", "grouped_mm")}
    verdicts = {path: check(layers[0], x_TE, path) for path in paths}
    samples = interleave(paths)
    roof = measure_roof(DEVICE, DTYPE)
    read, hit = bytes_read(layers, x_TE)
    flops = 2 * tokens * config.moe.experts_per_token * layers[0].gate_up[0].numel() * 1.5
    floor_us = max(read / roof.bytes_per_s, flops / roof.flops_per_s) * 1e6
    pairs, count = tokens * config.moe.experts_per_token, config.moe.num_experts
    inner = layers[0].down.shape[2]
    tiles = [
        asdict(choose_tiles(pairs, count, inner, gated, DTYPE.itemsize, is_hopper(DEVICE)))
        for gated in (True, False)
    ]
    line = (
        f"{model:14s} {tokens:5d} tokens {hit:6.1f} experts {read / 1e6:7.1f} MB, floor {floor_us:7.1f} us "
    )
    for path, values in samples.items():
        us = median(values)
        cell = {
            "model": model, "tokens": tokens, "dtype": "bfloat16", "path": path, "layers": LAYERS, "l2": "cold",
            "tiles": tiles if path == "triton" else None,
        }  # fmt: skip
        metrics = {
            "layer_us": us,
            "samples_us": [round(value, 2) for value in values],
            "experts_hit": hit,
            "expert_bytes": read,
            "copy_bytes_per_s": roof.copy_bytes_per_s,
            "matrix_flops_per_s": roof.flops_per_s,
            "bytes_us": read / roof.bytes_per_s * 1e6,
            "time_over_bytes_time": us / (read / roof.bytes_per_s * 1e6),
            "time_over_floor": us / floor_us,
            "TFLOP_per_s": flops / us / 1e6,
        }
        checks = verdicts[path].checks("moe")
        writer.write(Row(Status.ok, cell, "", metrics, checks, environment=environment()))
        line += f"| {path} {us:8.1f} us {us / floor_us:5.2f} x floor {flops / us / 1e6:5.0f} TF/s "
    print(line, flush=True)


@torch.no_grad()
def main(folder: Path, models: list[str]) -> None:
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    with RowWriter(folder / "rows.jsonl") as writer:
        for model in models:
            layers = build(config_of(model))
            for tokens in BATCHES:
                run_cell(model, layers, tokens, writer)
            del layers
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(MODELS))
