"""Pieces of files to where they belong: every byte, whatever the sizes, threads, dtypes and layouts."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fa_research.errors import CheckpointError
from fa_research.models.checkpoint_files import Stored, stored_tensors
from fa_research.models.experts import Target
from fa_research.models.transfer import Transfer
from tests.helpers import DEVICES
from tests.models.checkpoints import safetensors

SHAPES = [(1,), (8,), (33, 7), (3, 5, 11), (129,), (0, 4), (64, 64)]
PIECES = [8, 64, 1000, 1 << 20]


def save(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate(SHAPES)}
    safetensors.save_file(tensors, folder / "model.safetensors")
    return tensors


def run(
    loads: Sequence[tuple[Target, list[Stored]]], device: str, piece: int, threads: int = 3
) -> list[Target]:
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    with Transfer(where, threads, piece) as transfer:
        return list(transfer.run(loads))


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
def test_every_byte_arrives(stored: torch.dtype, device: str, piece: int, tmp_path: Path) -> None:
    """In its own dtype, converted, transposed, and transformed from two tensors to one; in the order given."""
    tensors, sources = save(tmp_path, stored), stored_tensors(tmp_path)

    def new(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    loads, expected = [], []
    for name, tensor in tensors.items():
        shape, both = tuple(tensor.shape), {name: tuple(tensor.shape), "t4": (129,)}
        wide = new((*shape, 3), stored)
        for target, result in (
            (Target(new(shape, stored), {name: shape}), tensor),
            (Target(new(shape, torch.bfloat16), {name: shape}), tensor.to(torch.bfloat16)),
            (Target(wide[..., 1], {name: shape}), tensor),
            (
                Target(new(shape, stored), both, transform=lambda *x: x[0] * 2 + x[-1][5]),
                tensor * 2 + tensors["t4"][5],
            ),
        ):
            loads.append((target, [sources[source] for source in target.sources]))
            expected.append(result)
    done = run(loads, device, piece)
    assert [id(target) for target in done] == [id(target) for target, _ in loads]
    for target, result in zip(done, expected, strict=True):
        torch.testing.assert_close(target.destination.cpu(), result, rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_file_that_shrinks_is_named(device: str, tmp_path: Path) -> None:
    tensors, sources = save(tmp_path, torch.float32), stored_tensors(tmp_path)
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 20)
    last = max(sources.values(), key=lambda stored: (stored.offset, stored.num_bytes))
    loads = [
        (Target(torch.empty(t.shape, device=device), {n: tuple(t.shape)}), [sources[n]])
        for n, t in tensors.items()
    ]
    with pytest.raises(CheckpointError, match=f"{file} ended within {last.name}; fetch it again"):
        run(loads, device, 64)


def test_files_are_closed_and_threads_end(tmp_path: Path) -> None:
    tensors, sources = save(tmp_path, torch.float32), stored_tensors(tmp_path)
    before = set(os.listdir("/proc/self/fd")), threading.active_count()
    loads = [(Target(torch.empty(t.shape), {n: tuple(t.shape)}), [sources[n]]) for n, t in tensors.items()]
    run(loads, "cpu", 64)
    os.truncate(tmp_path / "model.safetensors", 0)
    with pytest.raises(CheckpointError):
        run(loads, "cpu", 64)
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before


@pytest.mark.gpu
def test_device_memory_beside_the_weights_is_bounded(tmp_path: Path) -> None:
    """Transformed targets are stored once more on their way, but few of them at a time."""
    tensors = {f"t{i}": torch.randn(1 << 20) for i in range(64)}
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    sources = stored_tensors(tmp_path)
    loads = []
    for name, tensor in tensors.items():
        destination = torch.empty(1 << 20, device="cuda")
        loads.append(
            (Target(destination, {name: tuple(tensor.shape)}, transform=lambda x: x + 1), [sources[name]])
        )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(loads, "cuda", 1 << 20, threads=4)
    assert torch.cuda.max_memory_allocated() - before < 32 << 20
    for (target, _), tensor in zip(loads, tensors.values(), strict=True):
        assert torch.equal(target.destination.cpu(), tensor + 1)
