"""Which GPU a worker process takes, and who may time on it now: by locks of files, which go with their process.

Two locks a GPU: a *claim*, held as long as a worker lives, spreads the workers of several launcher processes over the
GPUs; the *turn*, held for one cell, keeps cells that share a GPU from disturbing each other's times.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from io import FileIO
from pathlib import Path


def lock_folder() -> Path:
    """Where this user's lock files are; made where it is missing."""
    folder = Path(tempfile.gettempdir()) / f"fa_research-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def visible_gpus() -> list[str]:
    """UUIDs of the NVIDIA GPUs that this process may use, in nvidia-smi's order or that of CUDA_VISIBLE_DEVICES."""
    found, asked = _installed_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is None or not found:
        return list(found)
    chosen: list[str] = []
    for entry in map(str.strip, asked.split(",")):
        if entry.isdigit() and int(entry) < len(found):
            chosen.append(found[int(entry)])
        elif entry.startswith(("GPU-", "MIG-")):
            chosen += [uuid for uuid in found if uuid.startswith(entry)] or [entry]
        else:
            break  # as CUDA does: what follows an unknown entry is invisible
    return chosen


@cache
def _installed_gpus() -> tuple[str, ...]:
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip())


class GpuShare:
    """One GPU of those given, which no other worker has claimed if there is such a one.

    Attributes:
        uuid: the GPU, as CUDA_VISIBLE_DEVICES takes it.
        alone: whether no other worker had claimed it.
    """

    def __init__(self, gpus: Sequence[str], folder: Path) -> None:
        self.folder = folder
        for uuid in gpus:
            claim = _open(folder / f"{uuid}.claim")
            if _try_lock(claim):
                self.uuid, self.alone, self._claim = uuid, True, claim
                return
            claim.close()
        self.uuid, self.alone = gpus[os.getpid() % len(gpus)], False

    @contextmanager
    def turn(self, say: Callable[[str], object]) -> Iterator[None]:
        """Wait until no other cell runs on the GPU and keep it; `say` is told if that takes a wait."""
        with _open(self.folder / f"{self.uuid}.turn") as file:
            if not _try_lock(file):
                say(
                    f"waiting for {self.uuid}: another process runs a cell on it, and both would be slower than alone"
                )
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def close(self) -> None:
        """Give the claim back."""
        if self.alone:
            self._claim.close()


def _open(path: Path) -> FileIO:
    return FileIO(path, "a")


def _try_lock(file: FileIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
