"""Engines of a small model, and the configs they are built from."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fa_research.config import Config, ModelConfig
from fa_research.engine.engine import Engine, Needs, build_engine
from fa_research.models import attention_specs, build_model

CPU = torch.device("cpu")
MODEL = ModelConfig(
    num_layers=1, hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=64, intermediate_size=32
)
NEEDS = Needs((20, 33, 1), 54)


def config_of(**changes: Any) -> Config:
    return dataclasses.replace(Config(model=MODEL), **changes)


def engine_of(config: Config, needs: Needs = NEEDS, device: torch.device = CPU) -> Engine:
    make = lambda device, dtype: build_model(config.model, dtype=dtype, device=device, seed=config.seed)  # noqa: E731
    return build_engine(config, needs, attention_specs(config.model), device, make)
