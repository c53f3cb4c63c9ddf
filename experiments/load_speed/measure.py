"""Building a model from a checkpoint against reading its files, with a cold and with a warm page cache.

Run: python experiments/load_speed/measure.py OUT_FOLDER [--layers 32] [--shards 4] [--tmp FOLDER] [--device cuda]

Writes a bfloat16 checkpoint of Llama 3.1 8B's shape (16 GB) with random weights into a temporary folder. Then, by
turns:

| what | which is |
|---|---|
| read | the files by as many threads, each into one buffer that it fills again and again: what the disk gives |
| build | `build_model` on the device, from config.json to the last weight |
| mapped | the tensors one after another from a mapping to the device, by one thread: the plain way |
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import median

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fa_research.config import ModelConfig
from fa_research.config.checkpoint import take_from_folder
from fa_research.models import Decoder, build_model
from fa_research.models.names import weight_targets
from fa_research.models.transfer import PIECE, THREADS
from fa_research.tracking import Row, RowWriter, Status, environment

ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "rope_scaling": ROPE, "tie_word_embeddings": False,
}  # fmt: skip


def config_of(folder: Path) -> ModelConfig:
    return take_from_folder(ModelConfig(path=str(folder)))


def make_checkpoint(folder: Path, layers: int, shards: int, device: torch.device) -> None:
    """Random weights, which are made where that is fast; a shard at a time in memory."""
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    model = Decoder(config_of(folder), dtype=torch.bfloat16, device="meta")
    shapes = {name: s for target in weight_targets(model).values() for name, s in target.sources.items()}
    per_shard = sum(torch.Size(shape).numel() for shape in shapes.values()) / shards
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    weight_map, done = {}, 0
    for name, shape in shapes.items():
        shard = min(int(done / per_shard), shards - 1)
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        parts[shard][name] = torch.randn(shape, dtype=torch.bfloat16, device=device).cpu()
        weight_map[name] = file
        done += parts[shard][name].numel()
        if name == list(shapes)[-1] or int(done / per_shard) > shard and shard < shards - 1:
            save_file(parts[shard], folder / file)
            parts[shard] = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def evict(files: list[Path]) -> None:
    """Out of the page cache; what is not on the disk yet cannot leave it."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def cached_fraction(files: list[Path]) -> float:
    """Of the files' pages, those that are in memory (mincore)."""
    inside = pages = 0
    libc = ctypes.CDLL(None, use_errno=True)
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
            count = -(-size // mmap.PAGESIZE)
            states = (ctypes.c_ubyte * count)()
            view = ctypes.c_char.from_buffer(mapped)
            if libc.mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(size), states):
                raise OSError(ctypes.get_errno(), "mincore")
            del view
            inside += sum(state & 1 for state in states)
            pages += count
    return inside / pages


def read(files: list[Path], threads: int) -> None:
    """Every byte once, in the pieces of the loader."""

    def pieces() -> Iterator[tuple[int, int]]:
        for descriptor, file in zip(descriptors, files, strict=True):
            for offset in range(0, file.stat().st_size, PIECE):
                yield descriptor, offset

    def work() -> None:
        view = memoryview(bytearray(PIECE))
        for descriptor, offset in iter(lambda: next(queue, None), None):
            done = 0
            while done < PIECE and (got := os.preadv(descriptor, [view[done:]], offset + done)):
                done += got

    descriptors = [os.open(file, os.O_RDONLY) for file in files]
    queue = iter(list(pieces()))
    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work) for _ in range(threads)]:
            future.result()
    for descriptor in descriptors:
        os.close(descriptor)


def build(folder: Path, device: torch.device) -> None:
    build_model(config_of(folder), dtype=torch.bfloat16, device=device, seed=0)


@torch.no_grad()
def mapped(folder: Path, files: list[Path], device: torch.device) -> None:
    model = Decoder(config_of(folder), dtype=torch.bfloat16, device=device)
    targets = weight_targets(model)
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118
                targets[name].destination.copy_(opened.get_tensor(name))


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """From nothing allocated on the device to all work done."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(folder: Path, options: argparse.Namespace, writer: RowWriter) -> None:
    device = torch.device(options.device)
    files = sorted(folder.glob("*.safetensors"))
    num_bytes = sum(file.stat().st_size for file in files)
    ways: dict[str, Callable[[], object]] = {
        "read": lambda: read(files, THREADS),
        "build": lambda: build(folder, device),
        "mapped": lambda: mapped(folder, files, device),
    }
    times: dict[tuple[str, str], list[float]] = {key: [] for key in product(("cold", "warm"), ways)}
    for turn, cache in product(range(options.repeats), ("cold", "warm")):
        names = list(ways)
        for name in names[turn % 3 :] + names[: turn % 3]:
            if cache == "cold":
                evict(files)
            cached = cached_fraction(files)
            taken = seconds(ways[name], device)
            times[cache, name].append(taken)
            cell = {
                "what": name, "cache": cache, "device": options.device, "layers": options.layers,
                "shards": options.shards, "threads": THREADS if name != "mapped" else 1, "piece_bytes": PIECE,
            }  # fmt: skip
            metrics = {
                "seconds": taken, "GB_per_s": num_bytes / taken / 1e9, "bytes": num_bytes,
                "cached_before": cached, "turn": turn,
            }  # fmt: skip
            writer.write(Row(Status.ok, cell, "", metrics, environment=environment()))
    for (cache, name), values in times.items():
        over = median(values) / median(times[cache, "read"])
        print(
            f"{cache} {name:6s} {median(values):8.3f} s {num_bytes / median(values) / 1e9:7.2f} GB/s, "
            f"{over:.2f} x reading  ({min(values):.3f} to {max(values):.3f} s)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for rows.jsonl")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tmp", type=Path, help="where the checkpoint goes for the time of the run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with (
        tempfile.TemporaryDirectory(dir=options.tmp) as folder,
        RowWriter(options.out / "rows.jsonl") as writer,
    ):
        make_checkpoint(Path(folder), options.layers, options.shards, torch.device(options.device))
        seconds(lambda: torch.zeros(1, device=options.device), torch.device(options.device))  # the context
        measure(Path(folder), options, writer)


if __name__ == "__main__":
    main()
