"""Marks around the phases of a pass, for the step-cost ledger. They do nothing unless someone listens.

    with mark(ATTENTION):
        ...

Marks may be nested: what runs belongs to the innermost one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

HOST_PLAN = "host_plan"  # what a backend decides on the host before the kernels are launched
METADATA = "metadata"  # lengths, slots, page table, and plans that are made on the device
KV_WRITE = "kv_write"  # the write to the cache, with the rotation that shares its kernel
ATTENTION = "attention"
MODEL = "model"  # everything else between the token ids and the logits
SAMPLING = "sampling"  # from the logits to tokens, on their way to the host

Boundary = Callable[[str | None], object]  # called with the phase that begins; None: no phase

_listener: Boundary | None = None
_open: list[str] = []
_nothing = nullcontext()


class _Mark:
    __slots__ = ("phase",)

    def __init__(self, phase: str) -> None:
        self.phase = phase

    def __enter__(self) -> None:
        _open.append(self.phase)
        _report()

    def __exit__(self, *exception: object) -> None:
        _open.pop()
        _report()


def mark(phase: str) -> AbstractContextManager[None]:
    """What runs inside belongs to `phase`. Without a listener: one shared object that does nothing."""
    return _nothing if _listener is None else _Mark(phase)


@contextmanager
def listening(boundary: Boundary) -> Iterator[None]:
    """Call `boundary` wherever a phase begins or ends, with the one that is then at hand. One listener at a time."""
    global _listener
    assert _listener is None and not _open, "phases are listened to already"
    _listener = boundary
    try:
        yield
    finally:
        _listener = None
        _open.clear()


def _report() -> None:
    if _listener is not None:
        _listener(_open[-1] if _open else None)
