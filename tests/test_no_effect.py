"""Keys that change nothing in a run are named in its notes, and sizes that default together fit together."""

from __future__ import annotations

import re

import pytest
from hydra import compose, initialize_config_dir

from fa_research.config import load_config
from fa_research.config.explain import _paths
from fa_research.config.no_effect import IDLE, given_keys, no_effect
from fa_research.config.schemas import WORKLOADS, Config
from fa_research.config.store import CONFIG_DIR, register


def composed(*overrides: str) -> Config:
    register()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return load_config(compose("config", list(overrides)), overrides)


def notes(*overrides: str, multirun: bool = False, on_gpu: bool = False) -> list[str]:
    return no_effect(composed(*overrides), given_keys(overrides), multirun=multirun, on_gpu=on_gpu)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["measure.timeout_s=5"], "measure.timeout_s"),
        (["sampling.top_k=5"], "sampling.top_k"),
        (["workload=extend", "sampling.temperature=1"], "sampling.temperature"),
        (["workload=decode", "workload.level=attention", "sampling.seed=1"], "sampling.seed"),
        (["cuda_graph=off", "cuda_graph.batch_sizes=[1]"], "cuda_graph.batch_sizes"),
        (["workload=mixed", "cuda_graph.mode=simulate"], "cuda_graph.mode"),
        (["workload=extend", "kv.reserve_ahead=4"], "kv.reserve_ahead"),
        (["tracking=disabled", "tracking.project=x"], "tracking.project"),
        (["workload.generate=0", "workload.prompt=x"], "workload.prompt"),
        (["workload=decode", "workload.batch_size=1", "workload.length_spread=0.5"], "workload.length_spread"),
        (["model=tiny", "workload=decode", "workload.level=attention", "model.vocab_size=512"], "model.vocab_size"),
        (["model=tiny", "model.rope_scaling.factor=2"], "model.rope_scaling.factor"),
        (["model=llama3_1b", "model.rope_scaling.beta_fast=16"], "model.rope_scaling.beta_fast"),
        (["model=tiny", "model.moe.bias=true"], "model.moe.bias"),
        (["measure.check=false", "measure.check_requests=4"], "measure.check_requests"),
        (["workload=decode", "measure.quality=true"], "measure.quality"),
        (["measure.l2=warm"], "measure.l2"),
        (["sweep.fail_fast=true"], "sweep.fail_fast"),
        (["workload=generate", "measure.repeats=5"], "measure.repeats"),
        (["workload=generate", "workload.prompt_file=x", "workload.prompt=y"], "workload.prompt"),
        (["backend=flex", "+backend.options.num_warps=8"], "backend.options.num_warps"),
    ],
)  # fmt: skip
def test_a_key_without_effect_is_named(overrides: list[str], key: str) -> None:
    assert [note.partition(":")[0] for note in notes(*overrides)] == [key]


@pytest.mark.parametrize(
    "overrides",
    [
        ["sampling.temperature=1", "sampling.top_k=5", "sampling.seed=3"],
        ["sampling=greedy", "workload=extend", "cuda_graph=off"],  # choices of groups are no keys
        ["model=llama3_1b", "model.rope_scaling.low_freq_factor=2"],
        ["workload=decode", "workload.length_spread=0.5", "kv.reserve_ahead=4"],
        ["workload.prompt=x"],
        ["workload=generate", "workload.prompt=x", "measure.warmup=5", "cuda_graph=off"],
    ],
)
def test_keys_with_an_effect_are_not_named(overrides: list[str]) -> None:
    assert notes(*overrides) == []


def test_folders_of_hydra() -> None:
    config = composed()
    single = no_effect(config, given_keys(["hydra.sweep.dir=/tmp/x"]), multirun=False, on_gpu=False)
    assert single == ["hydra.sweep.dir: no effect here, only a sweep (-m) reads it"]
    sweep = no_effect(config, given_keys(["hydra.sweep.dir=/tmp/x"]), multirun=True, on_gpu=False)
    assert sweep == []


def test_a_preset_sets_keys(tmp_path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text(
        "defaults: [{override /workload: text}]\nsampling: {top_k: 5}\nhydra: {mode: MULTIRUN}\n"
    )
    assert given_keys(["kv.page_size=4"], preset) == ["kv.page_size", "sampling.top_k"]


def test_the_table_names_keys_that_exist() -> None:
    known = {*_paths(Config), *(key for schema in WORKLOADS.values() for key in _paths(schema, "workload."))}
    named = {key for entry in IDLE for key in entry.keys.split()}
    free = {key for key in named if key.startswith(("hydra.", "backend.options."))}
    assert named - free <= known


@pytest.mark.parametrize(("length", "shared"), [(1, 0), (64, 32), (256, 128), (1024, 128)])
def test_a_short_prompt_shares_less(length: int, shared: int) -> None:
    assert composed(f"workload.prompt_len={length}").workload.shared_prefix_len == shared


def test_the_keys_beside_other_engines_flags_exist() -> None:
    known = {*_paths(Config), *(key for schema in WORKLOADS.values() for key in _paths(schema, "workload."))}
    page = (CONFIG_DIR.parent / "docs" / "coming_from.md").read_text(encoding="utf-8")
    cells = [line.split("|")[4] for line in page.splitlines() if line.startswith("| ")][1:]
    named = {
        text.partition("=")[0] for cell in cells for text in re.findall(r"`([a-z_.]+(?:=[\w]+)?)`", cell)
    }
    assert len(cells) > 15 and named - {"model"} and named <= known
