"""From what Hydra composed to the typed config, or one clear error."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from fa_research.config.checkpoint import take_from_folder
from fa_research.config.explain import explain, unknown_key
from fa_research.config.free_text import FREE_TEXT
from fa_research.config.schemas import WORKLOADS, Config
from fa_research.config.validate import validate
from fa_research.errors import ConfigError


def load_config(cfg: DictConfig, overrides: Iterable[str] = ()) -> Config:
    """What `read_config` gives, checked by `validate`, which raises the same."""
    config = read_config(cfg, overrides)
    validate(config)
    return config


def read_config(cfg: DictConfig, overrides: Iterable[str] = ()) -> Config:
    """The typed form of a composed config; with `model.path`, the model that the folder describes.

    overrides: what was typed, as in `model.num_layers=3`: a key that the folder decides is refused even where the value
    is the default, which the composed config cannot tell.

    Raises:
        ConfigError: unknown keys (forced in with `+` too), missing or mistyped values, a folder that does not do; the
            message names the key, what was given and what would work.
    """
    unknown = [unknown_key(key, schema) for key, schema in _unknown_keys(cfg)]
    if unknown:
        raise ConfigError("; ".join(unknown))
    try:
        config = _to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    if not isinstance(config, Config):
        raise ConfigError(
            "the composed config lacks schema/config in its defaults list, see configs/config.yaml"
        )
    if type(config.workload) not in WORKLOADS.values():
        raise ConfigError(f"no workload chosen; use workload= with one of {', '.join(WORKLOADS)}")
    if config.model.path is not None:
        config.model = take_from_folder(config.model, overrides)
    return config


def without_hydra(cfg: DictConfig) -> DictConfig:
    """A copy of a composed config as a task gets it from Hydra, so without the `hydra` node."""
    task = copy.deepcopy(cfg)
    with flag_override(task, ["readonly", "struct"], [False, False]):
        del task["hydra"]
    return task


def _to_object(cfg: DictConfig) -> object:
    """The dataclass that `cfg` is of. No text here is mandatory, so `???`, OmegaConf's mark of a missing value, is in
    `FREE_TEXT` what was typed."""
    marks = [key for key in FREE_TEXT if _holds_mark(cfg, key)]
    if marks:
        cfg = copy.deepcopy(cfg)
        with flag_override(cfg, ["readonly"], [False]):
            for key in marks:
                OmegaConf.update(cfg, key, "")
    config: Any = OmegaConf.to_object(cfg)
    for key in marks:
        group, _, name = key.partition(".")
        setattr(getattr(config, group), name, MISSING)
    return config


def _holds_mark(cfg: DictConfig, key: str) -> bool:
    group, _, name = key.partition(".")
    node = cfg.get(group)
    return isinstance(node, DictConfig) and OmegaConf.is_missing(node, name)


def _unknown_keys(node: object, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Keys that the schema of their node does not have, with that schema; nothing for a node that is a leaf."""
    if not isinstance(node, DictConfig):
        return
    schema = OmegaConf.get_type(node)
    known = {f.name for f in dataclasses.fields(schema)} if dataclasses.is_dataclass(schema) else None
    for key in map(str, node):
        if known is not None and schema is not None and key not in known:
            yield prefix + key, schema
        elif not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
            yield from _unknown_keys(node[key], f"{prefix}{key}.")
