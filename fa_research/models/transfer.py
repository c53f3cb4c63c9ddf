"""Tensors from files to where they belong, at the speed of the disk.

A few threads read pieces of the files. For a GPU they read into page-locked buffers, from which a piece is copied at
the full speed of the bus while other threads read; dtypes are converted there. On the CPU they read straight into the
destination. Reading with `pread`, and not through a mapping, makes requests as large as a piece, waits for no page
faults, and leaves other threads running.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from fa_research.errors import CheckpointError
from fa_research.models.checkpoint_files import DTYPES, Stored
from fa_research.models.experts import Target

THREADS = 8
PIECE = 16 << 20  # bytes; a multiple of every element's


@dataclass(frozen=True, slots=True)
class _Lane:
    """What one thread works with: a buffer of PIECE bytes, page-locked for a GPU, and there a stream of its own."""

    buffer: Tensor
    stream: torch.cuda.Stream | None


@dataclass(frozen=True, slots=True)
class _Load:
    """A target whose sources are on their way: to the destination itself, or, where something is left to do, to the
    tensors `landed`, as they are stored."""

    target: Target
    landed: list[Tensor]
    pieces: list[Future[None]]
    num_bytes: int


class Transfer:
    """Reads tensors to `device` with `threads` threads; a context, as it holds files open.

    Device memory beside the weights: a piece a thread where dtypes are converted, and the stored tensors of a target
    that is transformed, of which a few may be on their way at once (`THREADS` pieces, or one target).
    """

    def __init__(self, device: torch.device, threads: int = THREADS, piece: int = PIECE) -> None:
        assert piece % 8 == 0
        self.device, self.threads, self.piece = device, threads, piece
        self._lanes: SimpleQueue[_Lane] = SimpleQueue()
        self._files: dict[Path, int] = {}
        self._main = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def __enter__(self) -> Transfer:
        self._stack = ExitStack()
        self._pool = ThreadPoolExecutor(self.threads, "transfer")
        self._stack.callback(self._pool.shutdown, cancel_futures=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        for descriptor in self._files.values():
            os.close(descriptor)

    def run(self, loads: Iterable[tuple[Target, Sequence[Stored]]]) -> Iterator[Target]:
        """Write each target from its sources; yields it when it is written, in the order given.

        Raises CheckpointError for a file that cannot be read.
        """
        waiting: deque[_Load] = deque()
        for target, sources in loads:
            waiting.append(self._begin(target, sources))
            while len(waiting) > 1 and sum(load.num_bytes for load in waiting) > self.threads * self.piece:
                yield self._finish(waiting.popleft())
        while waiting:
            yield self._finish(waiting.popleft())

    def _begin(self, target: Target, sources: Sequence[Stored]) -> _Load:
        destination = target.destination.detach()
        landed = []
        if target.transform is not None or not destination.is_contiguous():
            landed = [torch.empty(s.shape, dtype=DTYPES[s.dtype], device=self.device) for s in sources]
        pieces = []
        for stored, tensor in zip(sources, landed or [destination], strict=True):
            if stored.path not in self._files:
                self._files[stored.path] = os.open(stored.path, os.O_RDONLY)
            pieces += self._submit(stored, tensor.as_strided((tensor.numel(),), (1,)))
        return _Load(target, landed, pieces, sum(stored.num_bytes for stored in sources))

    def _submit(self, stored: Stored, flat: Tensor) -> list[Future[None]]:
        size = DTYPES[stored.dtype].itemsize
        return [
            self._pool.submit(self._move, stored, begin, flat[begin // size : (begin + self.piece) // size])
            for begin in range(0, stored.num_bytes, self.piece)
        ]

    def _finish(self, load: _Load) -> Target:
        for piece in load.pieces:
            piece.result()
        if load.landed:
            load.target.write(*load.landed)
        return load.target

    def _move(self, stored: Stored, begin: int, part: Tensor) -> None:
        """One piece of a tensor, from byte `begin` of it on, to `part`."""
        dtype = DTYPES[stored.dtype]
        if self.device.type == "cpu" and part.dtype == dtype:
            self._read(stored, begin, part.view(torch.uint8))
            return
        lane = self._take_lane()
        try:
            staged = lane.buffer[: part.numel() * dtype.itemsize]
            self._read(stored, begin, staged)
            self._send(staged.view(dtype), part, lane.stream)
        finally:
            self._lanes.put(lane)

    def _send(self, staged: Tensor, part: Tensor, stream: torch.cuda.Stream | None) -> None:
        if stream is None or self._main is None:
            part.copy_(staged)
            return
        with torch.cuda.stream(stream):
            stream.wait_stream(self._main)  # what had this memory before may be in use there
            # A copy between devices would convert on the host.
            same = staged.dtype == part.dtype
            part.copy_(staged if same else staged.to(self.device, non_blocking=True), non_blocking=True)
        stream.synchronize()

    def _take_lane(self) -> _Lane:
        """One that no thread uses; made when there is none, so never more than threads."""
        with suppress(Empty):
            return self._lanes.get_nowait()
        cuda = self.device.type == "cuda"
        buffer = torch.empty(self.piece, dtype=torch.uint8, pin_memory=cuda)
        return _Lane(buffer, torch.cuda.Stream(self.device) if cuda else None)

    def _read(self, stored: Stored, begin: int, into: Tensor) -> None:
        """Fill `into` (bytes, on the host) from byte `begin` of the tensor on."""
        view = into.numpy().data
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self._files[stored.path], [view[done:]], stored.offset + begin + done)
            except OSError as error:
                raise CheckpointError(
                    f"model.path: {stored.path} cannot be read ({stored.name}: {error}); fetch it again"
                ) from error
            if not got:
                raise CheckpointError(f"model.path: {stored.path} ended within {stored.name}; fetch it again")
            done += got
