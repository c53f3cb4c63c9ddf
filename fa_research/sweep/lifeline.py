"""Processes in which a launcher runs cells: they end with the process that launched the sweep.

Else they would go on with their cells after it was killed, beside the same sweep started again. The launching process
names itself in the environment, which the processes of launchers on this machine inherit. Jobs of a queue (Slurm) are
meant to outlive it and are left alone, and Ray ends its own.
"""

from __future__ import annotations

import os
import threading
import time
from functools import cache
from pathlib import Path

from hydra.plugins.launcher import Launcher

_LAUNCHED_BY = "FA_RESEARCH_LAUNCHED_BY"  # the number of a process and when it began: numbers are used again
_HERE = {"JoblibLauncher", "LocalLauncher"}  # submitit's name for hydra/launcher=submitit_local
_POLL_S = 0.25


def is_here(launcher: Launcher) -> bool:
    """Whether it runs cells in other processes of this machine, which it waits for."""
    return type(launcher).__name__ in _HERE


def prepare_environment(launcher: Launcher) -> None:
    """For the processes that it will start: whom they have to end with, if they have to, and where this package is,
    also where it is not installed."""
    os.environ.pop(_LAUNCHED_BY, None)
    began = _began(os.getpid())
    if is_here(launcher) and began is not None:  # None where there is no /proc
        os.environ[_LAUNCHED_BY] = f"{os.getpid()} {began}"
    root, path = str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")
    if root not in path.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, path]))


@cache
def end_with_launcher() -> None:
    """From now on, also in the middle of a cell. Does nothing in a process that no launcher of this machine made."""
    pid, _, began = os.environ.get(_LAUNCHED_BY, "").partition(" ")
    if pid and int(pid) != os.getpid():
        threading.Thread(target=_watch, args=(int(pid), began), daemon=True).start()


def _watch(pid: int, began: str) -> None:
    while _began(pid) == began:
        time.sleep(_POLL_S)
    os._exit(1)  # its worker process (isolation/) notices, and locks of files go with it


def _began(pid: int) -> str | None:
    """When a process began, in clock ticks since the machine's; None for one that has ended (proc(5), stat)."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]
