"""Whether a worker process can run the next cell: is its CUDA context alive, did the last cell give its memory back."""

from __future__ import annotations

import gc
import sys

MAX_KEPT_BYTES = 512 << 20  # of GPU memory between cells: workspaces that backends keep; more is a leak


def context_lost() -> str | None:
    """What CUDA says if no kernel runs in this process any more, as after an illegal access; None if all is well.

    An error of a kernel stays with the context: whatever is launched next fails too.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
        (torch.zeros(1, device="cuda") + 1).item()
    except torch.OutOfMemoryError:
        return None
    except Exception as error:
        return " ".join(str(error).splitlines()[0].split()) or type(error).__name__
    return None


def give_back_memory() -> str | None:
    """Free what the last cell left behind; returns what is wrong if GPU memory stays in use."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    torch.cuda.empty_cache()
    kept = torch.cuda.memory_reserved()
    return f"{kept / 2**20:,.0f} MiB of GPU memory were not given back" if kept > MAX_KEPT_BYTES else None
