"""What a single run says first, from its config alone and before torch is imported: what it will do, and where."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from fa_research.config import Config, Device
from fa_research.config.sizes import least_memory
from fa_research.text import in_bytes

_FIRST = (
    "name",
    "level",
    "num_layers",
    "path",
    "prompt",
    "prompt_file",
)  # keys of a workload that are no sizes, or said apart


def opening(config: Config, output_dir: Path) -> str:
    """One line: backend, model, device, the workload's sizes, the least memory it takes, and the folder of its row."""
    workload = config.workload
    keys = [f.name for f in dataclasses.fields(workload) if f.name not in _FIRST]
    values = ((key, getattr(workload, key)) for key in keys)
    sizes = " ".join(f"{key}={value}" for key, value in values if value is not None)
    need = least_memory(config, _on_gpu(config))
    memory = f", at least {in_bytes(need.device)} of memory" if need else ""
    what = f"{workload.name} (level={workload.level}, {sizes})"
    return (
        f"backend={config.backend.name} model={config.model.name} device={config.device}, {what}{memory}; "
        f"results go to {output_dir}"
    )


def _on_gpu(config: Config) -> bool:
    """Whether the run will be on a GPU, as far as can be told without CUDA: `auto` dtypes are smaller there."""
    if config.device is not Device.auto:
        return config.device is Device.cuda
    return os.environ.get("CUDA_VISIBLE_DEVICES") != "" and Path("/dev/nvidiactl").exists()
