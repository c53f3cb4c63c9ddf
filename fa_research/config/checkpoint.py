"""What `model.path` does to the config: the folder's config.json decides the model's shape. No torch."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fa_research.config.ablation import ABLATIONS, given, leaves, take_over, was_typed
from fa_research.config.hf_config import model_fields
from fa_research.config.model_schema import ModelConfig
from fa_research.errors import ConfigError

PACKAGE = "pkg://"
USERS_OWN = frozenset({"name", "path", "dtype", "changed"})  # keys of `model` that a folder does not decide


def checkpoint_folder(path: str) -> Path:
    """The folder that `model.path` names; `pkg://` and a dotted package in front, as in Hydra's search paths, find what
    is installed with a package. Raises ConfigError for a package that is not installed."""
    if not path.startswith(PACKAGE):
        return Path(path).expanduser()
    package, _, rest = path.removeprefix(PACKAGE).partition("/")
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise ConfigError(f"model.path={path}: there is no package {package}; give pkg://<package>/<folder>")
    return Path(found.submodule_search_locations[0]) / rest


def take_from_folder(model: ModelConfig, overrides: Iterable[str] = ()) -> ModelConfig:
    """`model` with everything from the folder `model.path` but `USERS_OWN` and what was given of `ABLATIONS`, which
    `changed` then names; a default name becomes the folder's.

    Raises:
        ConfigError: no such folder or config.json; what it asks for is not supported; or a key that it decides was set
            to something else: the value is not the folder's, and not the default either or among the `overrides`.
    """
    assert model.path is not None
    folder = checkpoint_folder(model.path)
    fields = model_fields(read_config_json(folder), f"model.path={model.path}")
    name = folder.resolve().name if model.name == ModelConfig().name else model.name
    found = ModelConfig(name=name, path=model.path, dtype=model.dtype, **fields)
    overrides = tuple(overrides)
    if (model.changed and not set(model.changed) <= set(ABLATIONS)) or was_typed("model.changed", overrides):
        raise ConfigError(
            f"model.changed={model.changed}: is filled in where model.path is read; leave it out"
        )
    if refused := _set_besides(model, found, overrides):
        raise ConfigError(
            f"with model.path={model.path} its config.json decides {', '.join(refused)}; leave "
            f"{'it' if len(refused) == 1 else 'them'} out, or take a model without a folder, such as model=tiny "
            "(model.dtype, model.name, model.mask, model.local and model.softcap can be set)"
        )
    found.changed = given(dataclasses.asdict(model), overrides) if model.changed is None else model.changed
    take_over(found, model, found.changed)
    return found


def name_by_folder(plain: dict[str, Any]) -> None:
    """The same in a config as plain data, where the folder was not read and may not exist: `model.name` is not that of
    the default model."""
    model = plain.get("model")
    if isinstance(model, dict) and model.get("path") and model.get("name") == ModelConfig().name:
        plain["model"] = model | {"name": Path(str(model["path"])).name or model["name"]}


def read_config_json(folder: Path) -> dict[str, Any]:
    """Raises ConfigError, naming `model.path`, unless the folder has a config.json that holds a JSON object."""
    if not os.path.isdir(folder):  # a name that is too long is none either
        raise ConfigError(
            f"model.path={folder} is not a folder; give one with config.json and safetensors files, "
            "downloaded first (names on the Hugging Face hub are not looked up)"
        )
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"model.path={folder} has no config.json; give a Hugging Face folder") from None
    except OSError as error:
        raise ConfigError(f"model.path: {file} cannot be read: {error.strerror}") from error
    except ValueError as error:  # of JSON or of UTF-8
        raise ConfigError(f"model.path: {file} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"model.path: {file} holds no JSON object")
    return raw


def _set_besides(model: ModelConfig, found: ModelConfig, overrides: Iterable[str]) -> list[str]:
    """Keys that were set to other than the folder says, each with what it says."""
    asked, default, decided = (dict(leaves(dataclasses.asdict(m))) for m in (model, ModelConfig(), found))
    keys = [
        key
        for key, value in asked.items()
        if key not in USERS_OWN
        and key not in ABLATIONS
        and value != decided[key]
        and (value != default[key] or was_typed(f"model.{key}", overrides))
    ]
    return [f"model.{key}={decided[key]} (given: {asked[key]})" for key in keys]
