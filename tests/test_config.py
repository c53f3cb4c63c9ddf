"""Every YAML composes into the typed config, whose hash sees what is measured and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.utils import setup_globals
from omegaconf import DictConfig, OmegaConf

from fa_research import masks
from fa_research.config import WORKLOADS, Config, GraphMode, TextWorkload, config_hash, load_config, to_plain
from fa_research.config.store import CONFIG_DIR, GROUPS, choices, register
from tests.semantics.cases import every_mask

PLAIN_GROUPS = [group for group in GROUPS if group != "experiment"]
ALL_CHOICES = [(group, choice) for group in PLAIN_GROUPS for choice in choices(group)]


@pytest.fixture(scope="module", autouse=True)
def hydra_configs() -> Iterator[None]:
    register()
    with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
        yield


def composed(*overrides: str, hydra: bool = False) -> DictConfig:
    return compose("config", overrides=list(overrides), return_hydra_config=hydra)


def test_defaults_of_the_schemas_and_of_the_yaml_files_agree() -> None:
    # Whoever builds Config() in a test or a notebook gets what `python run.py` gets, but the model that needs files and
    # the text on the screen.
    plain = ["model=tiny", "workload.generate=0", "workload.prompt=null"]
    assert load_config(composed(*plain)) == Config()
    assert load_config(composed()).model.name == "pybyte"


@pytest.mark.parametrize(("group", "choice"), ALL_CHOICES)
def test_every_choice_composes(group: str, choice: str) -> None:
    config = load_config(composed(f"{group}={choice}"))
    if hasattr(part := getattr(config, group), "name"):
        assert part.name == choice


def test_every_workload_has_a_yaml_file_and_its_own_type() -> None:
    assert set(choices("workload")) == set(WORKLOADS)
    for name, schema in WORKLOADS.items():
        assert type(load_config(composed(f"workload={name}")).workload) is schema


def test_every_backend_has_a_yaml_file_and_the_reverse() -> None:
    from fa_research import backends

    assert set(choices("backend")) == {*backends.names(), "auto"}


def test_first_ablation_is_two_backends_by_two_page_sizes() -> None:
    cfg = composed("experiment=first_ablation", hydra=True)
    assert cfg.hydra.mode.name == "MULTIRUN"
    assert cfg.hydra.sweeper.params == {"backend": "torch,triton", "kv.page_size": "1,16"}
    assert cfg.workload.name == "decode"


@pytest.mark.parametrize("level", ["model", "attention"])
@pytest.mark.parametrize("workload", sorted(WORKLOADS.keys() - {"generate"}))  # which writes text
def test_every_workload_has_both_levels(workload: str, level: str) -> None:
    assert (
        str(load_config(composed(f"workload={workload}", f"workload.level={level}")).workload.level) == level
    )


def test_values_reach_the_typed_config() -> None:
    config = load_config(
        composed(
            "cuda_graph.mode=on",
            "cuda_graph.batch_sizes=[1,16,64]",
            "model=llama3_8b",
            "model.mask.name=sliding_window",
            "model.mask.size=1024",
            "+backend.options.pack_gqa=true",
            "kv.memory_fraction=0.5",
        )
    )
    assert config.cuda_graph.mode is GraphMode.on
    assert config.cuda_graph.batch_sizes == [1, 16, 64]
    assert (config.model.num_layers, config.model.rope_scaling.factor) == (32, 8.0)
    assert (config.model.mask.name, config.model.mask.size) == ("sliding_window", 1024)
    assert config.backend.options == {"pack_gqa": True}
    assert config.kv.memory_fraction == 0.5


@pytest.mark.parametrize("mask", every_mask("cpu")[0], ids=lambda mask: mask.name)
def test_every_mask_can_be_configured(mask: masks.Mask) -> None:
    fields = dataclasses.asdict(mask)
    size = [f"model.mask.size={fields.pop('size')}"] if "size" in fields else []
    options = [f"+model.mask.options.{name}={value}" for name, value in fields.items()]
    given = load_config(composed(f"model.mask.name={mask.name}", *size, *options)).model.mask
    assert masks.build(given.name, given.size, given.options) == mask


def test_hash_sees_what_is_measured_and_nothing_else() -> None:
    base = config_hash(composed())
    assert len(base) == 8
    assert int(base, 16) >= 0
    for same in (["study=other"], ["tracking.mode=disabled"], ["tracking=disabled"], ["tracking.tags=[a]"]):
        assert config_hash(composed(*same)) == base
    others = [
        ["seed=1"],
        ["kv.page_size=1"],
        ["debug=strict"],
        ["workload=decode"],
        ["backend=torch"],
        ["+backend.options.a=1"],
    ]
    assert len({base, *(config_hash(composed(*other)) for other in others)}) == len(others) + 1


def test_hash_is_the_same_for_every_form_of_a_config() -> None:
    cfg = composed("kv.page_size=64", "model=qwen3_8b")
    forms = [cfg, load_config(cfg), to_plain(cfg), composed("model=qwen3_8b", "kv.page_size=64", hydra=True)]
    assert len({config_hash(form) for form in forms}) == 1


def test_plain_form_is_plain_and_resolved() -> None:
    plain = to_plain(composed("study=${model.name}", hydra=True))
    assert plain["study"] == "tiny"
    assert plain["device"] == "auto"  # by name, not an Enum
    assert "hydra" not in plain
    kinds = {type(leaf) for leaf in _leaves(plain)}
    assert kinds <= {str, int, float, bool, type(None)}


def _leaves(node: object) -> Iterator[object]:
    if isinstance(node, dict | list):
        for item in node.values() if isinstance(node, dict) else node:
            yield from _leaves(item)
    else:
        yield node


def test_two_runs_of_one_moment_never_share_a_folder(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(setup_globals)  # gives Hydra its clock back
    OmegaConf.register_new_resolver("now", lambda pattern: "the-same-second", replace=True)
    runs = [composed("hydra.job.num=0", hydra=True) for _ in range(3)]
    for cfg in runs:
        assert cfg.hydra.run.dir == cfg.hydra.run.dir, "stable within one run"
        assert config_hash(cfg) in cfg.hydra.run.dir
        assert cfg.hydra.run.dir.startswith("outputs/default/the-same-second_")
    assert len({cfg.hydra.run.dir for cfg in runs}) == 3
    assert len({cfg.hydra.sweep.dir for cfg in runs}) == 3


def test_text_is_the_default_workload() -> None:
    assert isinstance(Config().workload, TextWorkload)
