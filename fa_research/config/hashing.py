"""A config as plain data, and a short name for what it measures."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from fa_research.config.ablation import given, leaves
from fa_research.config.schemas import Config

# Where and how results are kept does not change what is measured.
NOT_HASHED = frozenset({"tracking", "hydra", "study", "sweep"})
# With `model.path`, the folder says the rest, whether it has been read yet or not.
HASHED_WITH_PATH = frozenset({"path", "dtype"})


def to_plain(cfg: Config | DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The config as dicts, lists, strings and numbers: interpolations resolved, enums by name, no `hydra` node."""
    if isinstance(cfg, Config):  # by itself: OmegaConf would read `${x}` in a text once more
        return cast(dict[str, Any], _plain(dataclasses.asdict(cfg)))
    if not isinstance(cfg, DictConfig):
        return dict(cfg)
    node = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    plain = OmegaConf.to_container(node, resolve=True, enum_to_str=True)
    return cast(dict[str, Any], plain)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.name if isinstance(value, Enum) else value


def config_hash(cfg: Config | DictConfig | Mapping[str, Any], overrides: Iterable[str] = ()) -> str:
    """Eight hex digits that depend on every value but those of `NOT_HASHED`, and not on the order of keys.

    A checkpoint counts by its path as given, not by what is in the files, and by the keys given beside it. Before its
    folder was read, some of these only show in what was typed: `overrides`, or those in the `hydra` node of `cfg`.
    """
    measured = {key: value for key, value in to_plain(cfg).items() if key not in NOT_HASHED}
    if isinstance(options := measured.get("measure"), dict):
        measured["measure"] = {key: value for key, value in options.items() if key != "timeout_s"}
    model = measured.get("model")
    if isinstance(model, dict) and model.get("path") is not None:
        counted = {key: value for key, value in model.items() if key in HASHED_WITH_PATH}
        changed = model.get("changed")
        changed = given(model, overrides or _typed(cfg)) if changed is None else changed
        values = dict(leaves(model))
        measured["model"] = counted | {key: values[key] for key in changed if key in values}
    if isinstance(model := measured.get("model"), dict):
        measured["model"] = _without_empty_options(model)
    text = json.dumps(measured, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _without_empty_options(model: dict[str, Any]) -> dict[str, Any]:
    """`model` as it was before masks had options: a config that gives none keeps its hash."""
    found = {key: value for key, value in model.items() if value != {} or not key.endswith("mask.options")}
    for key, value in found.items():
        if key in ("mask", "local") and isinstance(value, dict):
            found[key] = _without_empty_options(value)
    return {key: value for key, value in found.items() if (key, value) != ("options", {})}


def _typed(cfg: Config | DictConfig | Mapping[str, Any]) -> list[str]:
    typed = OmegaConf.select(cfg, "hydra.overrides.task") if isinstance(cfg, DictConfig) else None
    return list(typed or [])
