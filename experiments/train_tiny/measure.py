"""Bits per byte of a finished model, byte by byte, as report.py reads them: `bits.npz` into --out.

python experiments/train_tiny/measure.py --model fa_research/checkpoints/pybyte --out outputs/pybyte
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from data import load as load_corpus
from evaluate import bits_of_each
from export import load
from model import dense_window, flex_window


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a folder that train.py wrote")
    parser.add_argument("--data", type=Path, help="a file of data.py; default: the running Python's library")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device, corpus, model = torch.device(args.device), load_corpus(args.data), load(args.model)
    model.to(device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        model.compile_parts()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    context = model.s.max_context_len
    window = (flex_window if on_gpu else dense_window)(context, model.s.sliding_window, device)
    bits = {}
    for split in ("dev", "held_out"):
        stream = torch.from_numpy(corpus[split]).to(device)
        found = bits_of_each(
            model, stream, corpus[f"{split}_starts"], window, args.batch_size, context, dtype
        )
        print(f"{split}: {float(found.double().nanmean()):.4f} bits per byte")
        bits[split] = found.half().cpu().numpy()
    args.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out / "bits.npz", **bits)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
