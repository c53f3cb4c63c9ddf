"""Texts in presets that YAML reads as numbers: `study: 2024_01` would be 202401, and `study: 1.10` a 1.1. No torch."""

from __future__ import annotations

from pathlib import Path

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf

from fa_research.config.free_text import TEXTS


def number_for_text(config: DictConfig) -> str | None:
    """What is wrong with the chosen preset of configs/experiment/, on one line; None if nothing is.

    Args:
        config: as Hydra composed it, with its `hydra` node.
    """
    name = config.hydra.runtime.choices.get("experiment")
    folders = [source.path for source in config.hydra.runtime.config_sources if source.schema == "file"]
    files = [Path(folder) / "experiment" / f"{name}.yaml" for folder in folders] if name else []
    return next((said for file in files if file.is_file() and (said := _in_file(file))), None)


def _in_file(file: Path) -> str | None:
    read = OmegaConf.load(file)
    written = OmegaConf.create(yaml.load(file.read_text(encoding="utf-8"), yaml.BaseLoader))  # noqa: S506
    for key in sorted(TEXTS):
        if isinstance(OmegaConf.select(read, key), bool | int | float):
            text = OmegaConf.select(written, key)
            return f"{key}: {text} in {file} is no text to YAML; put it in quotes there: {key}: '{text}'"
    return None
