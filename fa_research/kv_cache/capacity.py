"""How many pages the pool gets."""

from __future__ import annotations

import os

import torch

from fa_research.config import KVConfig
from fa_research.errors import ConfigError


def free_bytes(device: torch.device) -> int:
    """Bytes free on the device now (for the CPU: free physical memory)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch kept of the sweep's last cell is free, but the driver does not know it
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def choose_num_pages(kv: KVConfig, *, bytes_per_page: int, pages_needed: int, device: torch.device) -> int:
    """Usable pages: `kv.num_pages`, or what `kv.memory_fraction` of the free memory holds (the sink page
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
            f"{key} gives {max(num_pages, 0)} pages of kv.page_size={kv.page_size} slots, "
            f"the workload needs {pages_needed}; "
            f"raise it, or lower the workload's batch size or context"
        )
    return num_pages
