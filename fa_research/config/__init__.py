"""Typed configuration: schemas of every group, loading with clear errors, cross-field checks, the config hash."""

from __future__ import annotations

from fa_research.config.hashing import config_hash, to_plain
from fa_research.config.load import load_config
from fa_research.config.schemas import (
    WORKLOADS,
    BackendConfig,
    Config,
    CudaGraphConfig,
    DebugConfig,
    DecodeWorkload,
    Device,
    Dtype,
    ExtendWorkload,
    GraphMode,
    KVConfig,
    L2State,
    Level,
    MaskConfig,
    MeasureConfig,
    MixedWorkload,
    ModelConfig,
    RopeScaling,
    RopeType,
    TextWorkload,
    TrackingConfig,
    TrackingMode,
    WorkloadConfig,
)
from fa_research.config.validate import validate

__all__ = [
    "WORKLOADS",
    "BackendConfig",
    "Config",
    "CudaGraphConfig",
    "DebugConfig",
    "DecodeWorkload",
    "Device",
    "Dtype",
    "ExtendWorkload",
    "GraphMode",
    "KVConfig",
    "L2State",
    "Level",
    "MaskConfig",
    "MeasureConfig",
    "MixedWorkload",
    "ModelConfig",
    "RopeScaling",
    "RopeType",
    "TextWorkload",
    "TrackingConfig",
    "TrackingMode",
    "WorkloadConfig",
    "config_hash",
    "load_config",
    "to_plain",
    "validate",
]
