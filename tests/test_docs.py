"""What the documents say is true: commands compose, paths and keys exist, the example backend is right."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from fa_research.config import WORKLOADS, Config, load_config
from fa_research.config.free_text import quote_free_text
from fa_research.config.store import CONFIG_DIR, GROUPS, choices, register
from tests.test_checkpoint_config import folder_of
from tests.test_imports import LAYERS, PACKAGE, ROOT

DOCUMENTS = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "docs/coming_from.md",
    "experiments/README.md",
    "outputs/README.md",
)
FLAGS = {"-m", "--multirun"}


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def fenced(document: str, language: str) -> list[str]:
    """The contents of the code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(document), re.MULTILINE | re.DOTALL)


def backticked(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def commands(document: str) -> list[str]:
    """The arguments of every `python run.py`, in a shell block or in the text, and of `make run ARGS=`."""
    lines = [line for block in fenced(document, "bash") for line in block.splitlines()]
    found = []
    for line in [*lines, *backticked(text_of(document))]:
        if match := re.match(r"python run\.py\b(.*)", line) or re.match(r'make run ARGS="(.*?)"', line):
            found.append(match[1].strip())
    return found


COMMANDS = sorted({command for document in DOCUMENTS for command in commands(document)})


@pytest.fixture(scope="module")
def example_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config folder that holds the YAML of the README's example backend."""
    folder = tmp_path_factory.mktemp("example")
    (folder / "backend").mkdir()
    (source,) = fenced("README.md", "yaml")
    (folder / "backend" / "sdpa.yaml").write_text(source)
    return folder


@pytest.fixture(scope="module", autouse=True)
def hydra_configs() -> Iterator[None]:
    register()
    with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
        yield


def cells(overrides: list[str]) -> list[list[str]]:
    """What a command runs: its overrides with every combination of the swept values."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return [list(cell) for cell in BasicSweeper.split_arguments(parsed, None)[0]]


def test_there_are_commands_to_check() -> None:
    assert {"", "experiment=first_ablation"} <= set(COMMANDS)
    assert any(command.startswith("-m") for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[:60] or "defaults")
def test_every_command_composes(command: str, example_config: Path, tmp_path: Path) -> None:
    command = re.sub(r"/data/[\w.-]+", str(folder_of(tmp_path)), command)  # checkpoints that nobody has here
    typed = quote_free_text(shlex.split(command, comments=True))
    overrides = [arg for arg in typed if arg not in FLAGS]
    if any(override.startswith("-") for override in overrides):
        assert overrides[0] in {"--help", "--shell-completion"}
        return
    swept = any(argument in FLAGS for argument in shlex.split(command)) or "experiment=" in command
    found = cells(overrides)
    assert swept or len(found) == 1, "a sweep needs -m, or a preset that sweeps"
    for cell in found:
        load_config(compose("config", [*cell, f"hydra.searchpath=[file://{example_config}]"]))


def test_the_config_table_names_groups_choices_and_keys_that_exist() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (`.*?) \| (.*?) \|$", text_of("README.md"), re.MULTILINE)
    table = {group: (named, keys) for group, named, keys in rows if group in GROUPS}
    assert set(table) == set(GROUPS)
    for group, (named, keys) in table.items():
        assert set(backticked(named)) <= set(choices(group))
        assert all(key_exists(key) for key in backticked(keys)), keys


def key_exists(dotted: str) -> bool:
    """Whether a key is in the schema of the config (for workloads: in one of them)."""
    nodes: list[object] = [Config()]
    for name in dotted.split("."):
        nodes = [getattr(node, name) for node in nodes if hasattr(node, name)]
        if name == "workload":
            nodes = [schema() for schema in WORKLOADS.values()]
    return bool(nodes)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_key_in_the_documents_exists(document: str) -> None:
    groups = "|".join(f.name for f in dataclasses.fields(Config))
    words = [re.split(r"[=\s]", word)[0].removesuffix(".*") for word in backticked(text_of(document))]
    keys = {word for word in words if re.fullmatch(rf"({groups})(\.[a-z_0-9]+)+", word)}
    assert not {key for key in keys if not key_exists(key) and not key.endswith(".py")}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", text_of(document)):
        assert not target or (ROOT / document).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_anchor_is_a_heading(document: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]*)\)", text_of(document)):
        there = ((ROOT / document).parent / target).read_text() if target else text_of(document)
        headings = re.findall(r"^#+ (.*)$", there, re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("document", ["ARCHITECTURE.md", "CONTRIBUTING.md", "README.md"])
def test_every_path_in_the_documents_exists(document: str, example_config: Path) -> None:
    made_by_runs = ("outputs/", "fa_research/backends/sdpa.py", "configs/backend/sdpa.yaml", "hopper/")
    paths = [
        word
        for word in backticked(text_of(document))
        if re.fullmatch(r"[\w./-]+(/|\.(py|yaml|md|toml|txt))", word) and not word.startswith(made_by_runs)
    ]
    assert paths
    missing = [p for p in paths if not (ROOT / p).exists() and not (PACKAGE / p).exists()]
    assert not missing


def test_the_layers_are_those_that_are_enforced() -> None:
    rows = re.findall(r"^\| (\d+) \| `([\w/.]+)` \|", text_of("ARCHITECTURE.md"), re.MULTILINE)
    written = {name.rstrip("/").removesuffix(".py"): int(layer) for layer, name in rows}
    built = {name: layer for name, layer in LAYERS.items() if list(PACKAGE.glob(f"{name}*"))}
    assert written == built


def test_every_study_is_listed() -> None:
    listed = set(re.findall(r"^\| \[(\w+)\]", text_of("experiments/README.md"), re.MULTILINE))
    folders = {
        path.relative_to(ROOT / "experiments").parts[0] for path in (ROOT / "experiments").rglob("*.*")
    }
    assert listed == folders - {"README.md"}


CHECK_EXAMPLE = """
import sys
import torch
from fa_research import backends
backends.__path__.append(sys.argv[1])
from fa_research.masks import Causal, Chunked, Full, SlidingWindow
from tests.helpers import Scene, make_spec
for mask in (Causal(), SlidingWindow(7), Chunked(12), Full()):
    for lens, decode in ((((0, 17), (31, 9), (20, 1)), False), (((0, 1), (16, 1), (49, 1)), True)):
        scene = Scene(make_spec((6, 2), 64, mask, has_sink=decode), lens, 16, torch.float32, decode=decode)
        scene.check(backends.create("sdpa", scene.settings(), scene.specs))
"""


def test_the_example_backend_is_right(tmp_path: Path) -> None:
    """In a process of its own, where the README's code is a file of the package and is found like the others."""
    source, _ = fenced("README.md", "python")
    (tmp_path / "sdpa.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "-c", CHECK_EXAMPLE, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


CHECK_CALL_FROM_JAX = """
import sys
import torch
from fa_research.attention.reference import attention
from fa_research.interop.dlpack import to_jax
from fa_research.kv_cache import TokenToKVPool
from fa_research.spec import AttentionSpec
shape = dict(num_layers=1, num_kv_heads=2, head_dim=64, v_head_dim=64, dtype=torch.float32, device=torch.device("cpu"))
pool = TokenToKVPool(3, 16, **shape)
pool.fill_random(0)
exec(sys.stdin.read())
q = torch.randn(1, 4, 64)
table, lens = torch.tensor([[2, 1]], dtype=torch.int32), torch.tensor([21], dtype=torch.int32)
out = attend(to_jax(q), shared, to_jax(table), to_jax(lens))
slots = torch.cat([torch.arange(32, 48), torch.arange(16, 21)])
spec = AttentionSpec(4, 2, 64, 64, 64**-0.5)
expected, _ = attention(q, pool.k(0)[slots], pool.v(0)[slots], torch.tensor([20]), spec, compute_dtype=torch.float64)
torch.testing.assert_close(torch.from_dlpack(out), expected.float(), rtol=1e-4, atol=1e-5)
"""


def test_the_example_from_jax_is_right() -> None:
    pytest.importorskip("jax")
    _, source = fenced("README.md", "python")
    done = subprocess.run(
        [sys.executable, "-c", CHECK_CALL_FROM_JAX],
        cwd=ROOT,
        input=source,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_the_example_backend_has_a_config(example_config: Path) -> None:
    assert yaml.safe_load((example_config / "backend" / "sdpa.yaml").read_text()) == {"name": "sdpa"}
