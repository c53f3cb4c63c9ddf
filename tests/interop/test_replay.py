"""When a call's work is done, captured and replayed, on a stand-in for CUDA; on a GPU: tests/gpu/test_jax_replay.py."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from fa_research.interop import replay
from fa_research.interop.replay import Replays

_capturing: list[_Graph] = []
_graphs: dict[int, _Graph] = {}


class _Graph:
    """Keeps what `launch` was given during its capture. CUDA's errors: a capture in a capture, and the end of one that
    failed."""

    def __init__(self) -> None:
        self._kernels: list[Callable[[], None]] = []
        self._spoilt = False

    def capture_begin(self, **_: Any) -> None:
        if _capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        _capturing.append(self)

    def capture_end(self) -> None:
        _capturing.clear()
        if self._spoilt:
            raise RuntimeError("operation failed due to a previous error during capture")

    def add(self, kernel: Callable[[], None]) -> None:
        self._kernels.append(kernel)

    def spoil(self) -> None:
        self._spoilt = True

    def raw_cuda_graph_exec(self) -> int:
        _graphs[id(self)] = self
        return id(self)

    def replay(self) -> None:
        for kernel in self._kernels:
            kernel()


class _Driver:
    def cuGraphLaunch(self, executable: ctypes.c_void_p, stream: ctypes.c_void_p) -> int:
        assert executable.value is not None
        _graphs[executable.value].replay()
        return 0


def call(replays: Replays, work: Callable[[], None], stream: int, addresses: tuple[int, ...]) -> None:
    """As a custom call does it."""
    if not replays.launch(stream, addresses):
        replays.run(work, stream, addresses)


def launch(kernel: Callable[[], None]) -> None:
    _capturing[0].add(kernel) if _capturing else kernel()


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(replay, "_driver", _Driver)
    monkeypatch.setattr(replay, "_side", {})
    monkeypatch.setattr(replay, "_pools", {})
    yield
    _capturing.clear()
    _graphs.clear()


def test_work_is_launched_then_captured_then_replayed() -> None:
    replays, launched, done = Replays(), [], []

    def work() -> None:
        launched.append(len(_capturing))
        launch(lambda: done.append(1))

    for _ in range(4):
        call(replays, work, 1, (7,))
    assert launched == [0, 1] and len(done) == 4
    call(replays, work, 2, (7,))
    call(replays, work, 1, (8,))
    assert launched == [0, 1, 0, 0] and len(done) == 6, "another stream and another address are another graph"


def test_why_a_capture_failed_is_said() -> None:
    replays, wrong = Replays(), True

    def work() -> None:
        if wrong and _capturing:
            _capturing[0].spoil()
            raise ValueError("this kernel waits for the device")

    call(replays, work, 1, (7,))
    with pytest.raises(ValueError, match="waits for the device"):
        call(replays, work, 1, (7,))
    wrong = False
    call(replays, work, 1, (7,))  # nothing is left open


def test_programs_of_two_threads_capture_one_after_the_other() -> None:
    inside, errors = threading.Event(), []

    def work() -> None:
        if _capturing:
            inside.set()
            threading.Event().wait(0.05)  # lets the other one in

    def twice() -> None:
        replays = Replays()
        try:
            for _ in range(2):
                call(replays, work, 1, (7,))
        except RuntimeError as error:
            errors.append(error)

    threads = [threading.Thread(target=twice) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside.is_set() and not errors


def test_a_program_of_more_calls_than_graphs_still_replays_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_MOST", 16)
    replays, captured = Replays(), []
    for _ in range(10):
        captured.append(0)
        for address in range(20):
            call(replays, lambda: captured.__setitem__(-1, captured[-1] + bool(_capturing)), 1, (address,))
    assert sum(captured[5:]) < 5 * 20 / 2 and len(replays._graphs) == 16
