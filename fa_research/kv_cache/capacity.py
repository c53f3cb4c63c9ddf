"""How many pages the pool gets."""

from __future__ import annotations

import torch

from fa_research.config import KVConfig
from fa_research.errors import ConfigError
from fa_research.kv_cache.host_memory import free_host_bytes
from fa_research.text import plural


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on the device now; for the CPU see `free_host_bytes`. On a GPU a limit of this
    process (`torch.cuda.set_per_process_memory_fraction`) counts."""
    if device.type != "cuda":
        return free_host_bytes()
    torch.cuda.empty_cache()  # what torch kept of the sweep's last cell is free, but the driver does not know it
    free, total = torch.cuda.mem_get_info(device)
    fraction = torch.cuda.get_per_process_memory_fraction(device.index)  # None: the current device
    if fraction < 1:
        free = max(0, min(free, int(total * fraction) - torch.cuda.memory_reserved(device)))
    return free


def choose_num_pages(kv: KVConfig, *, bytes_per_page: int, pages_needed: int, device: torch.device) -> int:
    """Usable pages: `kv.num_pages`, or what `kv.memory_fraction` of the free memory holds (the null page
    included), or what the workload needs. Raises ConfigError when the workload cannot fit."""
    if kv.num_pages is not None:
        num_pages, key = kv.num_pages, f"kv.num_pages={kv.num_pages}"
    elif kv.memory_fraction is not None:
        num_pages = int(free_bytes(device) * kv.memory_fraction) // bytes_per_page - 1
        key = f"kv.memory_fraction={kv.memory_fraction}"
    else:
        return pages_needed
    if num_pages < pages_needed:
        raise ConfigError(
            f"{key} gives {plural(max(num_pages, 0), 'page')} of kv.page_size={kv.page_size} slots, "
            f"the workload needs {pages_needed}; "
            f"raise it, or lower the workload's batch size or context"
        )
    return num_pages
