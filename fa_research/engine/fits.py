"""Whether a cell can fit, asked before anything is built: what its config needs at least against what is free."""

from __future__ import annotations

import gc
from dataclasses import replace

import torch

from fa_research.config import Config
from fa_research.config.sizes import Memory, least_memory
from fa_research.errors import DoesNotFit
from fa_research.kv_cache.capacity import free_bytes
from fa_research.kv_cache.host_memory import free_host_bytes
from fa_research.text import in_bytes

_CPU = torch.device("cpu")
_SCALED = {
    "decode": "batch_size",
    "extend": "batch_size",
    "text": "batch_size",
    "generate": "generate",
    "mixed": "decode_requests",
    "trace": "pool_tokens",
}  # the key that a smaller workload has less of


def check_fits(config: Config, device: torch.device) -> None:
    """Raises DoesNotFit, with numbers, where the least that the cell needs exceeds what is free on the device or on the
    host. Says nothing of workloads that plugins add."""
    need = least_memory(config, device.type == "cuda")
    if need is None or _fits(need, device):
        return
    gc.collect()  # an engine that ended may wait to be collected
    if not _fits(need, device):
        raise DoesNotFit(f"{_needs(config, need, device)}; {_what_would_fit(config, device)}")


def _fits(need: Memory, device: torch.device) -> bool:
    if device.type != "cuda":
        return need.device + need.host <= free_bytes(device)
    return need.device <= free_bytes(device) and need.host <= free_host_bytes()


def _needs(config: Config, need: Memory, device: torch.device) -> str:
    total = need.device + (0 if device.type == "cuda" else need.host)
    parts = {
        "weights": need.weights,
        "KV pool": need.pool,
        "page table": need.table,
        "peak of a pass or of the check": need.peak,
        "lists on the host": need.host,
    }
    shown = " + ".join(f"{name} {in_bytes(size)}" for name, size in parts.items() if size)
    beside = f" and {in_bytes(free_host_bytes())} on the host" if device.type == "cuda" else ""
    return (
        f"out of memory: before anything was built, model={config.model.name} with {_key(config)} needs at least "
        f"{in_bytes(total)} ({shown}), free are {in_bytes(free_bytes(device))} on {device.type}{beside}"
    )


def _key(config: Config) -> str:
    name = _SCALED[config.workload.name]
    return f"workload.{name}={getattr(config.workload, name)}"


def _with(config: Config, value: int) -> Config:
    """The config with another size of the workload, and a pool no larger than that needs."""
    changes = {_SCALED[config.workload.name]: value}
    workload = replace(config.workload, **changes)  # type: ignore[arg-type]
    kv = replace(config.kv, num_pages=None, max_requests=None)
    return replace(config, workload=workload, kv=kv)


def _what_would_fit(config: Config, device: torch.device) -> str:
    """The largest size of the workload that could fit, or what to lower where none could."""

    def fits(value: int) -> bool:
        need = least_memory(_with(config, value), device.type == "cuda")
        return need is not None and _fits(need, device)

    key = f"workload.{_SCALED[config.workload.name]}"
    asked = getattr(config.workload, _SCALED[config.workload.name]) or 1
    if not fits(1):
        checked = ", measure.check=false (it computes in float64)" if config.measure.check else ""
        return (
            f"no {key} fits: take a smaller model, a smaller model.dtype, shorter lengths{checked}, or a device "
            "with more memory"
        )
    if fits(asked):
        given = {"kv.num_pages": config.kv.num_pages, "kv.max_requests": config.kv.max_requests}
        return f"lower {' or '.join(f'{key}={value}' for key, value in given.items() if value is not None)}"
    low, high = 1, asked
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return f"at most {key}={low} could fit, or shorter lengths"
