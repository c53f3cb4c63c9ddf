"""Backends that fail in the ways that a cell can; FA_RESEARCH_PLUGINS=tests.faulty names them to a sweep's workers."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fa_research.attention.call import AttentionCall, AttentionOutput
from fa_research.backends.torch_backend import TorchBackend


class _Sound(TorchBackend):
    """Right, and says in which process it ran."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        print(f"in process {os.getpid()}", file=sys.stderr, flush=True)

    def attend(self, call: AttentionCall) -> AttentionOutput:
        self.act(call.q_THD)
        return super().attend(call)

    def act(self, q_THD: Tensor) -> None:
        pass


class SoundA(_Sound):
    name = "sound_a"


class SoundB(_Sound):
    name = "sound_b"


class SoundC(_Sound):
    name = "sound_c"


class SoundD(_Sound):
    name = "sound_d"


class Crashes(_Sound):
    name = "crashes"

    def act(self, q_THD: Tensor) -> None:
        ctypes.string_at(0)


class KillsItself(_Sound):
    name = "kills_itself"

    def act(self, q_THD: Tensor) -> None:
        print("the last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


class LeavesAChild(_Sound):
    """Dies, and what it forked lives on and has all that it had open."""

    name = "leaves_a_child"

    def act(self, q_THD: Tensor) -> None:
        if os.fork() == 0:
            time.sleep(600)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)


class Exits(_Sound):
    name = "exits"

    def act(self, q_THD: Tensor) -> None:
        os._exit(7)


class Hangs(_Sound):
    name = "hangs"

    def act(self, q_THD: Tensor) -> None:
        time.sleep(600)


class Waits(_Sound):
    """As long as there is the file FAULTY_GATE; what it writes beside it says that it began."""

    name = "waits"

    def act(self, q_THD: Tensor) -> None:
        gate = Path(os.environ["FAULTY_GATE"])
        gate.with_suffix(".pid").write_text(str(os.getpid()))
        while gate.exists():
            time.sleep(0.01)


class Hungry(_Sound):
    """Wants more memory than there is."""

    name = "hungry"

    def act(self, q_THD: Tensor) -> None:
        torch.empty(1 << 50, dtype=torch.uint8, device=q_THD.device)


class Raises(_Sound):
    name = "raises"

    def act(self, q_THD: Tensor) -> None:
        raise RuntimeError("a bug of this backend")


class Wrong(_Sound):
    name = "wrong"

    def attend(self, call: AttentionCall) -> AttentionOutput:
        out, lse = super().attend(call)
        return 2 * out, lse


class FillsTheDisk(_Sound):
    """From now on this process can write to no file: the kernel refuses, as it does where the disk is full."""

    name = "fills_the_disk"

    def act(self, q_THD: Tensor) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


class AssertsOnTheDevice(_Sound):
    """An index out of range, which a kernel of torch finds: the CUDA context is lost."""

    name = "asserts_on_the_device"

    def act(self, q_THD: Tensor) -> None:
        torch.zeros(4, device=q_THD.device)[torch.full((64,), 10**6, device=q_THD.device)]


@triton.jit
def _write_far_away(pointer):  # type: ignore[no-untyped-def]
    tl.store(pointer + (1 << 44), 1.0)


class IllegalAccess(_Sound):
    """A kernel that writes where nothing is: the CUDA context is lost."""

    name = "illegal_access"

    def act(self, q_THD: Tensor) -> None:
        _write_far_away[(1,)](torch.zeros(64, device=q_THD.device))
        torch.cuda.synchronize()
