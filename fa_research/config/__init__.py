"""Typed configuration: schemas of every group, loading with clear errors, cross-field checks, the config hash."""

from __future__ import annotations

from fa_research.config.checkpoint import checkpoint_folder
from fa_research.config.hashing import config_hash, to_plain
from fa_research.config.load import load_config, read_config
from fa_research.config.model_schema import (
    Activation,
    Dtype,
    LocalConfig,
    MaskConfig,
    ModelConfig,
    MoEConfig,
    RopeScaling,
    RopeType,
)
from fa_research.config.schemas import (
    WORKLOADS,
    BackendConfig,
    Config,
    CudaGraphConfig,
    DebugConfig,
    DecodeWorkload,
    Device,
    ExtendWorkload,
    GraphMode,
    KVConfig,
    L2State,
    Level,
    MeasureConfig,
    MixedWorkload,
    SamplingConfig,
    SweepConfig,
    TextWorkload,
    TimerKind,
    TrackingConfig,
    TrackingMode,
    WorkloadConfig,
)
from fa_research.config.validate import validate

__all__ = [
    "WORKLOADS",
    "Activation",
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
    "LocalConfig",
    "MaskConfig",
    "MeasureConfig",
    "MixedWorkload",
    "MoEConfig",
    "ModelConfig",
    "RopeScaling",
    "RopeType",
    "SamplingConfig",
    "SweepConfig",
    "TextWorkload",
    "TimerKind",
    "TrackingConfig",
    "TrackingMode",
    "WorkloadConfig",
    "checkpoint_folder",
    "config_hash",
    "load_config",
    "read_config",
    "to_plain",
    "validate",
]
