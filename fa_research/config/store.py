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
GROUPS = (
    "backend",
    "model",
    "kv",
    "cuda_graph",
    "workload",
    "sampling",
    "measure",
    "sweep",
    "tracking",
    "experiment",
    "debug",
)


def choices(group: str) -> list[str]:
    """Names of a group's YAML files, sorted."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def register() -> None:
    """Make the schemas and resolvers known to Hydra; safe to call again.

    One schema of the whole config checks every group. Only workloads have schemas of their own, as each has other keys;
    they live apart from configs/workload/, where they would show up as choices.
    """
    store = ConfigStore.instance()
    root = OmegaConf.structured(schemas.Config)
    # Left open: a default of one workload's type would refuse the others when the group is merged into it.
    root.workload = OmegaConf.structured(schemas.WorkloadConfig)
    store.store(group="schema", name="config", node=root)
    for name, schema in schemas.WORKLOADS.items():
        store.store(group="schema/workload", name=name, node=schema)
    OmegaConf.register_new_resolver("fa.config_hash", lambda *, _root_: config_hash(_root_), replace=True)
    # As in `new_len: ${fa.minus:32768,${workload.prefix_len}}`: what is left where another key is swept.
    OmegaConf.register_new_resolver("fa.minus", lambda a, b: int(a) - int(b), replace=True)
    # Half of a size, and no more than `most`: a default that also fits where the size is made small.
    OmegaConf.register_new_resolver(
        "fa.half_up_to", lambda most, size: max(0, min(int(most), int(size) // 2)), replace=True
    )
    # Cached with the composed config, so every use within one run agrees and no two compositions do.
    OmegaConf.register_new_resolver("fa.nonce", lambda: secrets.token_hex(3), use_cache=True, replace=True)
