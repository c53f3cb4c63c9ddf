"""How much memory this process can still get on the host: physical memory, cgroups and its own limit."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def free_host_bytes() -> int:
    """The least of what the machine, each cgroup above this process and `ulimit -v` leave. Caches that the kernel drops
    when memory is asked for count as free, and so does swap of the machine."""
    return max(0, min([_machine(), *_cgroups(), *_own_limit()]))


def _fields(path: str | Path) -> dict[str, int]:
    """The numbers of a file of lines `name number`, such as /proc/meminfo; {} where it cannot be read."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.replace(":", " ").split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdigit()}


def _machine() -> int:
    found = _fields("/proc/meminfo")
    available = found.get("MemAvailable")
    if available is None:
        return 2**63
    return 1024 * (available + found.get("SwapFree", 0))


def _cgroups() -> Iterator[int]:
    """What each group that limits memory leaves; in a container its own group is at the root."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _of_groups(_CGROUPS, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            yield from _of_groups(_CGROUPS / "memory", path, *names)


def _of_groups(root: Path, path: str, limit: str, usage: str, cached: str) -> Iterator[int]:
    group = root / path.lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root):
            return
        most, used = _number(folder / limit), _number(folder / usage)
        if most is not None and used is not None:
            yield most - used + _fields(folder / "memory.stat").get(cached, 0)


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no such file, or it says `max`."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _own_limit() -> Iterator[int]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _fields("/proc/self/status").get("VmSize")
    if limit != resource.RLIM_INFINITY and used is not None:
        yield limit - 1024 * used
