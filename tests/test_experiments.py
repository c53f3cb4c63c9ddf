"""Every preset composes, every cell that it sweeps is valid, and no two of them are one; what the studies tell to type
can be typed. No cell is run, no torch."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from fa_research.compare.__main__ import parser
from fa_research.config import Config, config_hash, load_config, to_plain
from fa_research.config.store import CONFIG_DIR, choices, register
from tests.test_imports import ROOT

PRESETS = choices("experiment")
# Sweeps of the lab are to end within minutes: about a second a cell.
MOST_CELLS = 100


@pytest.fixture(scope="module", autouse=True)
def hydra_configs() -> Iterator[None]:
    register()
    with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
        yield


def sweep_of(preset: str) -> dict[str, str]:
    """Keys and comma-separated values that a preset sweeps."""
    cfg = compose("config", [f"experiment={preset}"], return_hydra_config=True)
    params = OmegaConf.select(cfg, "hydra.sweeper.params") or {}
    return {str(key): str(value) for key, value in params.items()}


@cache
def configs(preset: str) -> list[Config]:
    """Of each cell. Composing takes most of the time, so it is done once for each choice of groups."""
    swept = [f"{key}={values}" for key, values in sweep_of(preset).items()]
    parsed = OverridesParser.create().parse_overrides(swept)
    composed: dict[tuple[str, ...], DictConfig] = {}
    found = []
    for cell in BasicSweeper.split_arguments(parsed, None)[0]:
        groups = tuple(override for override in cell if "." not in override.partition("=")[0])
        if groups not in composed:
            composed[groups] = compose("config", [f"experiment={preset}", *groups])
        cfg = copy.deepcopy(composed[groups])
        for override in OverridesParser.create().parse_overrides([o for o in cell if o not in groups]):
            OmegaConf.update(cfg, override.key_or_group, override.value())
        found.append(load_config(cfg))
    return found


@pytest.mark.parametrize("preset", PRESETS)
def test_every_cell_is_valid_and_different(preset: str) -> None:
    hashes = [config_hash(config) for config in configs(preset)]
    assert 1 < len(hashes) <= MOST_CELLS
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_says_how_it_is_started(preset: str) -> None:
    lines = (CONFIG_DIR / "experiment" / f"{preset}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_" and any(f"experiment={preset}" in line for line in lines[1:4])


@pytest.mark.parametrize("preset", PRESETS)
def test_captured_sizes_are_those_that_are_swept(preset: str) -> None:
    """A batch that is padded to another size would measure that size."""
    for config in configs(preset):
        if config.workload.name == "decode" and preset != "first_ablation":
            assert config.workload.batch_size in config.cuda_graph.batch_sizes  # type: ignore[attr-defined]


def test_a_prompt_is_as_long_whatever_of_it_is_cached() -> None:
    workloads: list[Any] = [config.workload for config in configs("extend_prefix")]
    lens = {(workload.prefix_len, workload.new_len) for workload in workloads}
    assert len(lens) == 7 and {prefix + new for prefix, new in lens} == {32768}


STUDIES = sorted(path.parent.name for path in (ROOT / "experiments").glob("*/README.md"))


def commands(study: str) -> list[list[str]]:
    """What a study's README tells to type, in shell blocks: the words of each line."""
    text = (ROOT / "experiments" / study / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.parametrize("study", STUDIES)
def test_what_a_study_tells_to_type_exists(study: str) -> None:
    for words in commands(study):
        if words[:2] == ["python", "run.py"]:
            compose(
                "config", [w for w in words[2:] if w not in ("-m", "--multirun")]
            )  # a sweep may complete it
        elif words[:3] == ["python", "-m", "fa_research.compare"]:
            options = parser().parse_args(words[3:])
            if options.closure:  # it reads what other studies publish
                assert all(any((ROOT / path).glob("**/*.jsonl")) for path in options.paths)
                continue
            assert all(path.parts[:2] == ("experiments", study) for path in options.paths)
            for key in (options.question, *options.ignore):
                assert any(
                    key_exists(config, key) for preset in presets_of(study) for config in configs(preset)
                )


def presets_of(study: str) -> list[str]:
    """The presets whose rows a study keeps: they have its name in front."""
    return [preset for preset in PRESETS if preset.startswith(study)]


def key_exists(config: Config, dotted: str) -> bool:
    plain: Any = to_plain(config)
    for name in dotted.split("."):
        if not isinstance(plain, dict) or name not in plain:
            return False
        plain = plain[name]
    return True
