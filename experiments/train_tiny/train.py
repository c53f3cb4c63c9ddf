"""Trains the shipped model. README.md beside this file says how it was run.

python experiments/train_tiny/train.py --out outputs/train_tiny --minutes 5.5    the schedule fits the time
python experiments/train_tiny/train.py --out outputs/train_tiny --steps 4000     the same steps on any machine
python experiments/train_tiny/train.py --out outputs/trial --minutes 0.75 --trial    config.yaml's `trial`, one by one
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
import subprocess
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from data import describe, load
from evaluate import bits_of_each, sample
from export import round_to_bf16, save
from model import ModelSettings, TinyModel, dense_window, flex_window
from optim import make_optimizers
from torch import Tensor

CALIBRATE = (10, 40)  # steps between which the time of a step is measured
PROMPTS = (b"\x00", b"def main(", b"import os\nimport sys\n\nclass Parser:\n")


@dataclass(frozen=True)
class TrainSettings:
    """See config.yaml."""

    seed: int = 0
    batch_size: int = 32
    optimizer: str = "muon"
    lr: float = 0.01
    embed_lr: float = 0.005
    weight_decay: float = 0.1
    dropout: float = 0.05
    grad_clip: float = 1.0
    warmup_steps: int = 100
    decay: float = 0.7
    window_kernel: str = "flex"
    eval_seconds: float = 30.0
    log_steps: int = 50


class Run:
    """One training run on `device`: its model, data, schedule and curve."""

    def __init__(
        self, m: ModelSettings, t: TrainSettings, corpus: dict[str, Any], device: torch.device
    ) -> None:
        self.m, self.t, self.corpus, self.device = m, t, corpus, device
        torch.manual_seed(t.seed)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = TinyModel(m, t.dropout).to(device)
        if device.type == "cuda":
            self.model.compile_parts()
        flex = t.window_kernel == "flex" and device.type == "cuda"
        self.window = (flex_window if flex else dense_window)(m.max_context_len, m.sliding_window, device)
        self.streams = {key: torch.from_numpy(corpus[key]).to(device) for key in ("train", "dev", "held_out")}
        self.optimizers = make_optimizers(self.model, t.optimizer, t.lr, t.embed_lr, t.weight_decay)
        self.peaks = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.curve: list[dict[str, Any]] = []
        self.start, self.step_seconds, self.total = time.perf_counter(), math.nan, 0

    def sync(self) -> float:
        """Seconds since the beginning, when all that was asked for is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - self.start

    def batches(self) -> Iterator[Tensor]:
        """[B, T + 1] int64, for ever: each pass over the data cuts it at other places and in another order."""
        generator = torch.Generator().manual_seed(self.t.seed)
        stream, context = self.streams["train"], self.m.max_context_len
        offsets = torch.arange(context + 1, device=self.device)
        while True:
            phase = int(torch.randint(context, (), generator=generator))
            starts = torch.arange(phase, len(stream) - context - 1, context)
            starts = starts[torch.randperm(len(starts), generator=generator)].to(self.device)
            for part in starts.split(self.t.batch_size):
                if len(part) == self.t.batch_size:
                    yield stream[part[:, None] + offsets].long()

    def scale(self, step: int) -> float:
        """Of the learning rate: up, level, then down to 0 in a line."""
        up = min(1.0, (step + 1) / self.t.warmup_steps)
        down = (self.total - step) / max(1.0, self.t.decay * self.total) if self.total else 1.0
        return max(0.0, min(up, down))

    def step(self, tokens: Tensor, scale: float) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            loss = self.model.nats(tokens[:, :-1], tokens[:, 1:], self.window, self.dtype).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.t.grad_clip)
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def bits(self, split: str) -> Tensor:
        """Of each byte; NaN for separators."""
        starts = self.corpus[f"{split}_starts"]
        batch, context = self.t.batch_size, self.m.max_context_len
        return bits_of_each(self.model, self.streams[split], starts, self.window, batch, context, self.dtype)

    def evaluate(self, split: str) -> float:
        """Bits per byte of whole files."""
        return float(self.bits(split).double().nanmean())

    def train(self, seconds: float, steps: int | None) -> None:
        """Until the learning rate is 0: after `steps`, or as many as fit into `seconds` from now, with the evaluations
        at the end of the run."""
        first, last = CALIBRATE
        self.total, seen, losses = steps or 0, 0, []
        evaluated = evaluating = began = 0.0
        batches = self.batches()
        while seen < (self.total or last + 1):
            if seen == first:
                self.evaluate("dev")  # compiled outside of what is timed
                began = self.sync()
                self.evaluate("dev")
                evaluating = self.sync() - began
                began = evaluated = self.sync()
            if seen == last:
                self.step_seconds = (self.sync() - began) / (last - first)
                self.total = self.total or self._steps_in(seconds, evaluating, seen)
            losses.append(self.step(next(batches), self.scale(seen)))
            seen += 1
            if seen % self.t.log_steps == 0 or seen == self.total:
                now = self.sync()
                due = seen > last and (now - evaluated >= self.t.eval_seconds or seen == self.total)
                self._log(seen, losses, now, due)
                losses, evaluated = [], now if due else evaluated

    def _steps_in(self, seconds: float, evaluating: float, seen: int) -> int:
        left = seconds - self.sync()
        evaluations = (
            left / self.t.eval_seconds + 6
        )  # held-out text is larger than dev, and there are samples
        return seen + max(10, int(0.98 * (left - evaluations * evaluating) / self.step_seconds))

    def _log(self, step: int, losses: list[Tensor], now: float, due: bool) -> None:
        row = {
            "step": step,
            "seconds": round(now, 2),
            "bytes": step * self.t.batch_size * self.m.max_context_len,
            "lr_scale": round(self.scale(step - 1), 4),
            "train_bits_per_byte": round(float(torch.stack(losses).mean()) / math.log(2), 4),
            "dev_bits_per_byte": round(self.evaluate("dev"), 4) if due else None,
        }
        self.curve.append(row)
        if due:
            print(json.dumps(row), flush=True)

    @torch.no_grad()
    def check(self) -> dict[str, float]:
        """Bits per byte of the beginning of the dev files: as in training, and in float32 with dense masks, uncompiled.
        They differ by the rounding alone, or a kernel is wrong."""
        self.model.eval()
        context, batch = self.m.max_context_len, self.t.batch_size
        tokens = self.streams["dev"][: context + 1].long().expand(batch, -1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            trained = self.model.nats(tokens[:, :-1], tokens[:, 1:], self.window, self.dtype)[0]
        logits = self.model.logits(tokens[:1, :-1])[0]
        plain = torch.nn.functional.cross_entropy(logits, tokens[0, 1:])
        return {
            "as_trained": float(trained.mean()) / math.log(2),
            "plain_float32": float(plain) / math.log(2),
        }

    def summary(self, bits: dict[str, Tensor]) -> dict[str, Any]:
        """bits: of each byte of dev and held_out, after the weights were rounded to bfloat16."""
        tokens = self.t.batch_size * self.m.max_context_len
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": self.total,
            "bytes_seen": self.total * tokens,
            "epochs": round(self.total * tokens / len(self.corpus["train"]), 2),
            "step_ms": round(self.step_seconds * 1e3, 2),
            "bytes_per_second": round(tokens / self.step_seconds),
            "train_bits_per_byte": self.curve[-1]["train_bits_per_byte"],
            "dev_bits_per_byte": round(float(bits["dev"].double().nanmean()), 4),
            "held_out_bits_per_byte": round(float(bits["held_out"].double().nanmean()), 4),
            "check": {key: round(value, 4) for key, value in self.check().items()},
            "evaluation": "bf16 weights, windows of the context's length every half of it"
            + (", autocast to bf16" if self.dtype == torch.bfloat16 else ""),
            "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)
            if self.device.type == "cuda"
            else None,
            "seconds": round(self.sync(), 1),
        }


def environment(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "python": platform.python_version(), "torch": torch.__version__, "device": str(device),
        "machine": platform.machine(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    if device.type == "cuda":
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.split("\n")[0]
        found |= {"gpu": torch.cuda.get_device_name(device), "driver": driver, "cuda": torch.version.cuda}
    return found


def settings(config: dict[str, Any], changes: dict[str, Any]) -> tuple[ModelSettings, TrainSettings]:
    """Those of config.yaml with `changes`, whose keys are of either."""
    model, train = ModelSettings(**config["model"]), TrainSettings(**config["train"])
    of_model = {field.name for field in fields(ModelSettings)}
    model = replace(model, **{k: v for k, v in changes.items() if k in of_model})
    return model, replace(train, **{k: v for k, v in changes.items() if k not in of_model})


def one_run(args: argparse.Namespace, config: dict[str, Any], changes: dict[str, Any], corpus: dict[str, Any],
            out: Path) -> dict[str, Any]:  # fmt: skip
    """Trains, saves the folder, the curve and the summary under `out`; returns the summary."""
    m, t = settings(config, changes)
    device = torch.device(args.device)
    run = Run(m, t, corpus, device)
    run.train(args.minutes * 60, args.steps)
    round_to_bf16(run.model)
    save(run.model, out)
    with (out / "curve.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=run.curve[0])
        writer.writeheader()
        writer.writerows(run.curve)
    bits = {split: run.bits(split) for split in ("dev", "held_out")}
    half = {split: each.half().cpu().numpy() for split, each in bits.items()}
    np.savez_compressed(out / "bits.npz", **half)  # type: ignore[arg-type]
    summary = run.summary(bits) | {"environment": environment(device), "model": vars(m), "train": vars(t)}
    summary |= {"corpus": describe(corpus), "command_minutes": args.minutes, "command_steps": args.steps}
    if not args.trial:
        summary["samples"] = [sample(run.model, prompt, 300, t.seed) for prompt in PROMPTS]
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def trial(args: argparse.Namespace, config: dict[str, Any], corpus: dict[str, Any]) -> None:
    """Every candidate after the other; one that fails says so, and the next one runs."""
    rows = []
    for name, candidate in config["trial"].items():
        print(f"--- {name} {candidate}", flush=True)
        try:
            result = one_run(args, config, {**candidate, **args.changes}, corpus, args.out / name)
            keys = ("bytes_per_second", "step_ms", "steps", "epochs", "train_bits_per_byte", "dev_bits_per_byte",
                    "check", "peak_memory_gb", "seconds")  # fmt: skip
            rows.append({"name": name} | {key: result[key] for key in keys})
        except Exception as error:  # noqa: BLE001 - whatever it is, it is printed and the others still run
            traceback.print_exc()
            rows.append({"name": name, "error": repr(error)[:300]})
        torch.compiler.reset()
        if args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    (args.out / "trial.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print("\n".join(json.dumps(row) for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("config.yaml"))
    parser.add_argument("--data", type=Path, help="a file of data.py; default: the running Python's library")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--minutes", type=float, default=5.5, help="of a run, compilation and evaluation included"
    )
    parser.add_argument("--steps", type=int, help="instead of what fits into --minutes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--trial", action="store_true")
    parser.add_argument("changes", nargs="*", help="key=value of config.yaml's model or train")
    args = parser.parse_args()
    args.changes = {k: yaml.safe_load(v) for k, _, v in (change.partition("=") for change in args.changes)}
    torch.set_float32_matmul_precision("high")
    config = yaml.safe_load(args.config.read_text())
    corpus = load(args.data)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.trial:
        return trial(args, config, corpus)
    result = one_run(args, config, args.changes, corpus, args.out)
    print("\n\n".join(result.pop("samples")))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
