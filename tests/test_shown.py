"""What `--cfg job` shows is what the run would use."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from fa_research.config import load_config
from fa_research.config.load import without_hydra
from fa_research.config.shown import show_real_values
from fa_research.config.store import CONFIG_DIR, register


def shown(*overrides: str) -> tuple[DictConfig, list[str]]:
    register()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose("config", list(overrides), return_hydra_config=True)
    lines = show_real_values(cfg, list(overrides))
    return without_hydra(cfg), lines


def test_the_model_is_that_of_its_folder_and_sizes_are_resolved() -> None:
    cfg, lines = shown("workload.prompt_len=64", "model.mask.name=sliding_window", "model.mask.size=32")
    assert cfg.model.num_layers == 8 and cfg.model.name == "pybyte" and cfg.model.mask.size == 32
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert plain["workload"]["shared_prefix_len"] == 32
    assert any("pybyte/config.json" in line for line in lines)
    assert all(line.startswith("# ") for line in lines)


def test_what_is_shown_can_be_run() -> None:
    cfg, _ = shown("seed=3", "workload.batch_size=2")
    register()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        direct = load_config(compose("config", ["seed=3", "workload.batch_size=2"]))
    again = load_config(cfg)
    again.model.changed = direct.model.changed  # keys that are given count as changed, also to the same value
    assert again == direct


@pytest.mark.parametrize("workload", ["decode", "extend", "mixed", "text", "trace"])
def test_values_left_open_are_explained(workload: str) -> None:
    path = ["workload.path=/x.csv"] if workload == "trace" else []
    _, lines = shown("model=tiny", f"workload={workload}", *path)
    said = "\n".join(lines)
    for key in (
        "device=auto",
        "backend=auto",
        "model.dtype=auto",
        "cuda_graph.mode=auto",
        "sampling.seed=null: 0",
    ):
        assert key in said
    assert ("kv.num_pages=null" in said) == (workload != "trace")
    assert shown("model=tiny", "device=cpu", "backend=torch", "model.dtype=float32", "kv.dtype=float32",
                 "cuda_graph=off", "sampling.seed=1", "kv.num_pages=900")[1] == []  # fmt: skip


def test_a_config_that_would_be_refused_is_shown_with_the_reason() -> None:
    cfg, lines = shown("kv.page_size=0", "model.path=null")
    assert cfg.kv.page_size == 0
    assert lines == ["# this run would be refused: kv.page_size=0: must be from 1 to 256 slots"]
