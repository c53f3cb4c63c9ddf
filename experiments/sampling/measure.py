"""What choosing a token costs: greedy, temperature, top-k, top-p and min-p, as CUDA graphs, against torch; and what it
adds to a captured decode step.

Run on a Hopper GPU, half a minute: python experiments/sampling/measure.py OUT_FOLDER [kernels] [step]
A graph holds the same call several times over logits that stay in L2 as far as they fit, which is how the model's head
leaves them: `l2` is `warm`. Variants take turns in random order. Before a cell is timed, its tokens are compared with
those of plain torch on the same logits, by sorting.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from fa_research import workloads
from fa_research.batch import ForwardBatch
from fa_research.config import Config, GraphMode, load_config
from fa_research.config.store import CONFIG_DIR, register
from fa_research.engine.decode import DecodeRunner
from fa_research.engine.decode_state import DecodeState
from fa_research.engine.engine import Engine, build_engine
from fa_research.engine.sampling import GREEDY, SamplingParams, pack
from fa_research.kernels import ops, sampling_torch
from fa_research.models import attention_specs, build_model
from fa_research.tracking import Row, RowWriter, Status, environment

DEVICE = torch.device("cuda")
BF16, FP32 = torch.bfloat16, torch.float32
CELLS = [(1, 128256, BF16), (16, 128256, BF16), (64, 128256, BF16)]  # rows, vocabulary, type
CELLS += [(64, 151936, BF16), (64, 262144, BF16), (64, 128256, FP32)]
SORTED = (64, 128256)  # cells that plain torch is timed on
CALLS, ROUNDS = 10, 12  # calls in a graph, replays of it
SAMPLED = {
    "sampled_greedy": GREEDY,  # what a greedy request costs beside sampled ones
    "temperature": SamplingParams(0.8),
    "top_k": SamplingParams(0.8, top_k=50),
    "top_k_1000": SamplingParams(0.8, top_k=1000),  # too many for the leading groups: the row is searched
    "top_p": SamplingParams(0.8, top_p=0.95),
    "top_k_top_p": SamplingParams(0.8, top_k=50, top_p=0.95),
    "all": SamplingParams(0.8, 50, 0.95, 0.05),
}
STEPS, STEP_BATCHES = 60, (1, 64)
Run = Callable[[], object]


def logits_of(kind: str, rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """`flat`: standard normal. `peaked`: a wide normal and 20 ids far above it, as a trained model is sure of a few."""
    x = torch.randn(rows, vocab, device=DEVICE)
    if kind == "peaked":
        x = x * 2.5
        ids = torch.randint(vocab, (rows, 20), device=DEVICE)
        x.scatter_(1, ids, 12 + 3 * torch.randn(rows, 20, device=DEVICE))
    return x.to(dtype)


def capture(run: Run, calls: int) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph


def interleave(runs: dict[str, Run], calls: int = CALLS, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Microseconds per call of each variant, in rounds of random order; the first two rounds are dropped."""
    graphs = {name: capture(run, calls) for name, run in runs.items()}
    events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
    order, rng = list(graphs), random.Random(0)
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graphs[name].replay()
            end.record()
            events.append((name, start, end))
    torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for name, start, end in events:
        samples[name].append(start.elapsed_time(end) * 1e3 / calls)
    return {name: values[2:] for name, values in samples.items()}


def sampled(logits_BX: Tensor, params: SamplingParams, out_B: Tensor, sample: Callable[..., None]) -> Run:
    size = logits_BX.shape[0]
    requests = [
        SamplingParams(params.temperature, params.top_k, params.top_p, params.min_p, seed)
        for seed in range(size)
    ]
    packed = pack(requests, DEVICE)
    positions_B = torch.arange(size, dtype=torch.int32, device=DEVICE) + 1000
    return lambda: sample(logits_BX, *packed, positions_B, out_B)


def check(logits_BX: Tensor, params: SamplingParams) -> dict[str, float]:
    """The share of rows whose token is that of plain torch; one row may differ by the rounding of its mass."""
    ours_B, torchs_B = (
        torch.full((logits_BX.shape[0],), -1, dtype=torch.int64, device=DEVICE) for _ in range(2)
    )
    sampled(logits_BX, params, ours_B, ops.sample)()
    sampled(logits_BX, params, torchs_B, sampling_torch.sample)()
    equal = (ours_B == torchs_B).float()
    assert equal.sum() >= len(equal) - 1 and ours_B.min() >= 0, (params, ours_B.tolist(), torchs_B.tolist())
    return {"same_token_share": equal.mean().item()}


def run_cell(kind: str, rows: int, vocab: int, dtype: torch.dtype, writer: RowWriter) -> None:
    logits_BX = logits_of(kind, rows, vocab, dtype)
    out_B = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    checks = {name: check(logits_BX, params) for name, params in SAMPLED.items()}
    assert torch.equal(ops.argmax(logits_BX), logits_BX.argmax(-1))
    runs: dict[str, Run] = {
        "torch_argmax": lambda: torch.argmax(logits_BX, dim=-1, out=out_B),
        "argmax": lambda: ops.argmax(logits_BX, out=out_B),
    }
    runs |= {name: sampled(logits_BX, params, out_B, ops.sample) for name, params in SAMPLED.items()}
    samples = interleave(runs)
    if (rows, vocab) == SORTED:
        by_sorting = sampled(logits_BX, SAMPLED["all"], out_B, sampling_torch.sample)
        samples |= interleave({"torch_sort": by_sorting}, calls=1, rounds=5)
    line = f"{kind:6s} {rows:3d} x {vocab:6d} {str(dtype)[6:]:8s}"
    for name, values in samples.items():
        cell = {
            "part": "kernels", "logits": kind, "rows": rows, "vocab": vocab, "dtype": str(dtype)[6:], "variant": name,
            "l2": "warm", "calls_in_a_graph": CALLS if name != "torch_sort" else 1,
        }  # fmt: skip
        metrics = {"call_us": median(values), "samples_us": [round(value, 2) for value in values]}
        writer.write(Row(Status.ok, cell, "", metrics, checks.get(name, {}), environment=environment()))
        line += f" | {name} {median(values):.1f}"
    print(line, flush=True)


class Unsampled(DecodeRunner):
    """The decode step without the choice of a token."""

    def _compute(self, batch: ForwardBatch, state: DecodeState) -> Tensor | None:
        return self.runner.model.compute_logits(self.runner.forward(batch))


def build(size: int) -> tuple[Engine, workloads.Workload]:
    """Two layers of Llama 3 8B with its vocabulary, random weights, and requests with 512 tokens in the cache."""
    register()
    overrides = ["model=llama3_8b", "model.num_layers=2", "workload=decode", "measure.check=false"]
    overrides += [f"workload.batch_size={size}", f"workload.steps={STEPS}"]
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        config: Config = load_config(compose("config", overrides))
    workload = workloads.create(config)

    def make_model(device: torch.device, dtype: torch.dtype):  # type: ignore[no-untyped-def]
        return build_model(config.model, dtype=dtype, device=device, seed=0)

    engine = build_engine(config, workload.needs(), attention_specs(config.model), DEVICE, make_model)
    workload.prepare(engine)
    return engine, workload


def run_steps(size: int, writer: RowWriter) -> None:
    """A captured decode step without sampling, greedy, and sampled; in rounds of random order."""
    engine, workload = build(size)
    requests = workload.requests  # type: ignore[attr-defined]
    lens = [request.seq_len for request in requests]
    greedy: dict[str, list[SamplingParams]] = {"unsampled": [GREEDY] * size, "greedy": [GREEDY] * size}
    params = greedy | {name: [chosen] * size for name, chosen in SAMPLED.items()}
    runners = {}
    for name in params:
        kind = Unsampled if name == "unsampled" else DecodeRunner
        runners[name] = kind(
            engine.runner,
            mode=GraphMode.on,
            batch_sizes=[size],
            max_seq_len_k=max(lens) + STEPS,
            reserve_ahead=STEPS,
            sampling=name in SAMPLED,
        )
    samples: dict[str, list[float]] = {name: [] for name in runners}
    rng = random.Random(0)
    for _ in range(5):
        for name in rng.sample(list(runners), len(runners)):
            for request, seq_len in zip(requests, lens, strict=True):
                request.seq_len = seq_len
            samples[name] += step_times(runners[name], requests, params[name])
    base = median(samples["unsampled"])
    line = f"step of {size:3d}"
    for name, values in samples.items():
        cell = {
            "part": "step",
            "model": "llama3_8b",
            "num_layers": 2,
            "rows": size,
            "variant": name,
            "l2": "as the step leaves it",
        }
        metrics = {
            "decode_step_us": median(values),
            "over_unsampled_us": median(values) - base,
            "samples_us": [round(value, 2) for value in values],
        }
        writer.write(Row(Status.ok, cell, "", metrics, environment=environment()))
        line += f" | {name} {median(values):.1f} (+{median(values) - base:.1f})"
    print(line, flush=True)


def step_times(decoder: DecodeRunner, requests: list, params: list[SamplingParams]) -> list[float]:  # type: ignore[type-arg]
    """Microseconds of steps that follow one another without a pause, the first five dropped."""
    tokens = torch.arange(len(requests))
    decoder.start(requests, tokens, params)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS)]
    for event in events:
        decoder.step()
        event.record()
    torch.cuda.synchronize()
    decoder.flush()
    return [a.elapsed_time(b) * 1e3 for a, b in zip(events[4:], events[5:], strict=False)]


@torch.inference_mode()
def main(folder: Path, parts: list[str]) -> None:
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    with RowWriter(folder / "rows.jsonl") as writer:
        if "kernels" in parts:
            for cell in CELLS:
                for kind in ("peaked", "flat"):
                    run_cell(kind, *cell, writer)
        if "step" in parts:
            for size in STEP_BATCHES:
                run_steps(size, writer)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["kernels", "step"])
