"""What `--cfg job` shows: the sizes that the run would use, and what the values left open come to. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from omegaconf import DictConfig, OmegaConf

from fa_research.config.ablation import leaves
from fa_research.config.load import read_config, without_hydra
from fa_research.config.model_schema import Dtype
from fa_research.config.schemas import Config, Device, GraphMode, TraceWorkload
from fa_research.config.sizes import least_work
from fa_research.config.validate import validate
from fa_research.errors import ConfigError
from fa_research.text import plural


def show_real_values(cfg: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Comment lines about a composed config, whose values become those of the run: interpolations are resolved, and
    with `model.path` the model is the folder's. A config that would be refused keeps its values, and the line says why.

    Args:
        cfg: as Hydra composed it, `hydra` node included; only the rest is changed.
        overrides: what was typed.
    """
    task = without_hydra(cfg)
    try:
        config = read_config(task, overrides)
        validate(config)
    except ConfigError as error:
        return [f"# this run would be refused: {' '.join(str(error).split())}"]
    for key in task:
        if isinstance(node := cfg[key], DictConfig):
            OmegaConf.resolve(node)
    if config.model.path is not None:
        for name, value in leaves(dataclasses.asdict(config.model)):
            if name != "changed":  # it cannot be given, and what is shown may be given to a run
                OmegaConf.update(cfg.model, name, value)
    return [f"# {line}" for line in _left_open(config)]


def _left_open(config: Config) -> Iterator[str]:
    """What `auto` and `null` come to, as far as the config alone tells."""
    model, kv, trace = config.model, config.kv, isinstance(config.workload, TraceWorkload)
    if model.path is not None:
        yield f"model: as {model.path}/config.json says"
    if config.device is Device.auto:
        yield "device=auto: cuda where torch sees a GPU, otherwise cpu"
    if config.backend.name == "auto":
        yield "backend=auto: the first backend of the measured order that serves this model here; the row names it"
    if model.dtype is Dtype.auto:
        yield "model.dtype=auto: bfloat16 on a GPU, float32 on the CPU"
    if kv.dtype is Dtype.auto:
        yield "kv.dtype=auto: the dtype of the model"
    if config.cuda_graph.mode is GraphMode.auto:
        yield "cuda_graph.mode=auto: on with CUDA where the backend can be captured, simulate on the CPU"
    if config.sampling.seed is None:
        yield f"sampling.seed=null: {config.seed}, the seed of the run"
    work = None if trace else least_work(config)
    if work is not None and kv.num_pages is None and kv.memory_fraction is None:
        yield f"kv.num_pages=null: what the workload needs, {plural(work.pages, 'page')} or a few more"
