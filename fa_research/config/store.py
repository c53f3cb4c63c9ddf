"""What Hydra must know before it composes: the schemas, and the resolvers used in configs/."""

from __future__ import annotations

import secrets
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from fa_research.config import schemas
from fa_research.config.hashing import config_hash

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"

# In the order in which --help lists them.
GROUPS = ("backend", "model", "kv", "cuda_graph", "workload", "measure", "tracking", "experiment", "debug")


def choices(group: str) -> list[str]:
    """Names of a group's YAML files, sorted."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def _all_choices() -> str:
    return "\n".join(f"  {group + ':':<12} {', '.join(choices(group))}" for group in GROUPS)


def register() -> None:
    """Make the schemas and resolvers known to Hydra; safe to call again.

    The schemas live in a group of their own, because in the groups that users choose from they would show up as
    choices.
    """
    store = ConfigStore.instance()
    root = OmegaConf.structured(schemas.Config)
    # Left open: a default of one workload's type would refuse the others when the group is merged into it.
    root.workload = OmegaConf.structured(schemas.WorkloadConfig)
    store.store(group="schema", name="config", node=root)
    for group, schema in _GROUP_SCHEMAS.items():
        store.store(group="schema", name=group, node=schema)
    for name, schema in schemas.WORKLOADS.items():
        store.store(group="schema/workload", name=name, node=schema)
    OmegaConf.register_new_resolver("fa.config_hash", lambda *, _root_: config_hash(_root_), replace=True)
    # Cached with the composed config, so every use within one run agrees and no two compositions do.
    OmegaConf.register_new_resolver("fa.nonce", lambda: secrets.token_hex(3), use_cache=True, replace=True)
    OmegaConf.register_new_resolver("fa.choices", _all_choices, replace=True)


_GROUP_SCHEMAS: dict[str, type] = {
    "backend": schemas.BackendConfig,
    "model": schemas.ModelConfig,
    "kv": schemas.KVConfig,
    "cuda_graph": schemas.CudaGraphConfig,
    "measure": schemas.MeasureConfig,
    "tracking": schemas.TrackingConfig,
    "debug": schemas.DebugConfig,
}
