"""The roof, measured on the GPU at hand: the rates of copying, reading and matrix products on random data. Kept on disk
for each GPU, driver, version of torch and dtype, in `$XDG_CACHE_HOME/fa_research` (`~/.cache/fa_research`)."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from fa_research.config import L2State
from fa_research.measure.nvml import Gpu, find_gpu
from fa_research.measure.timing import Timer

log = logging.getLogger(__name__)

_BYTES = 1 << 30
_MATRIX = 8192
_KEPT_DAYS = 30
_FORMAT = 2  # counts up when the roof is measured in another way


@dataclass(frozen=True, slots=True)
class Roof:
    """Bytes per second that a copy moves (read and written) and that a sum reads, operations per second of a matrix
    product, the day they were measured, and whether that was in another process."""

    copy_bytes_per_s: float
    read_bytes_per_s: float
    flops_per_s: float
    measured: str = ""
    cached: bool = False

    @property
    def bytes_per_s(self) -> float:
        """The higher rate: memory that is only read need not turn from reading to writing, which costs a copy time."""
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)

    def fraction(self, num_bytes: int, flops: int, microseconds: float) -> float:
        """The time that these bytes or operations take at least, over the time they took."""
        return max(num_bytes / self.bytes_per_s, flops / self.flops_per_s) / microseconds * 1e6


@cache
def measure_roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """Once per process, device and dtype (about 50 ms), or what an earlier process measured in the last 30 days."""
    place, identity = _place(device, dtype)
    return read_roof(place, identity) or _measure(device, dtype, place, identity)


def measure_roof_again(device: torch.device, dtype: torch.dtype) -> Roof:
    """Measured now, and kept instead of what was cached."""
    place, identity = _place(device, dtype)
    place.unlink(missing_ok=True)
    measure_roof.cache_clear()
    return measure_roof(device, dtype)


def _measure(device: torch.device, dtype: torch.dtype, place: Path, identity: dict[str, Any]) -> Roof:
    timer = Timer(device, warmup=3, max_seconds=2.0, l2=L2State.warm)
    copied, read = _byte_rates(timer, device, _BYTES)
    a, b = (torch.randn(_MATRIX, _MATRIX, device=device).to(dtype) for _ in range(2))
    product = timer.time(lambda: a @ b, 10)
    today = datetime.now(UTC).date().isoformat()
    roof = Roof(copied, read, 2 * _MATRIX**3 / product.median_us * 1e6, today)
    write_roof(place, identity, roof)
    return roof


def _byte_rates(timer: Timer, device: torch.device, num_bytes: int) -> tuple[float, float]:
    """Bytes per second of a copy, both ways counted, and of a sum: of all numbers or of each row, whichever is faster
    here."""
    source = torch.randn(num_bytes // 4, device=device)
    target, rows = torch.empty_like(source), source.view(1 << 12, -1)
    copy = timer.time(partial(target.copy_, source), 10)
    sums = [timer.time(run, 10) for run in (source.sum, partial(rows.sum, 1))]
    read_us = min(timing.median_us for timing in sums)
    return 2 * num_bytes / copy.median_us * 1e6, num_bytes / read_us * 1e6


def _place(device: torch.device, dtype: torch.dtype) -> tuple[Path, dict[str, Any]]:
    """The file of this roof, and what it is the roof of."""
    properties, gpu = torch.cuda.get_device_properties(device), find_gpu(device)
    identity = {
        "format": _FORMAT,
        "gpu": properties.name,
        "uuid": str(getattr(properties, "uuid", "")),
        "multiprocessors": properties.multi_processor_count,
        "driver": gpu.driver() if isinstance(gpu, Gpu) else None,
        "torch": torch.__version__,
        "dtype": str(dtype),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / f"roof-{digest}.json", identity


def cache_folder() -> Path:
    """Where this user's caches of fa_research are."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "fa_research"


def read_roof(place: Path, identity: dict[str, Any], today: date | None = None) -> Roof | None:
    """The roof of this file; None where there is none, it is of something else, older than 30 days or damaged."""
    today = today or datetime.now(UTC).date()
    try:
        data = json.loads(place.read_text(encoding="utf-8"))
        rates = [float(data[f"{what}_per_s"]) for what in ("copy_bytes", "read_bytes", "flops")]
        measured = date.fromisoformat(data["measured"])
        same = data["identity"] == identity
    except (OSError, ValueError, KeyError, TypeError):
        return None
    fresh = timedelta() <= today - measured <= timedelta(days=_KEPT_DAYS)
    if not same or not fresh or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        return None
    copied, read, flops = rates
    return Roof(copied, read, flops, measured.isoformat(), cached=True)


def write_roof(place: Path, identity: dict[str, Any], roof: Roof) -> None:
    """Keep it, whole or not at all; where that cannot be, it is measured again by the next process."""
    new = place.with_suffix(f".{os.getpid()}.new")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(asdict(roof) | {"identity": identity}), encoding="utf-8")
        new.replace(place)
    except OSError as error:
        log.warning("the roof was not kept in %s: %s", place, error)
        with suppress(OSError):
            new.unlink(missing_ok=True)
