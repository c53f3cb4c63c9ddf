"""Plugins that are wrong: one line that is true, before any cell runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fa_research import backends, discovery, masks, plugins, workloads
from fa_research.backends import AttentionBackend
from fa_research.errors import ConfigError
from fa_research.masks import Mask
from fa_research.workloads import Workload

BASES = {"backend": (backends, AttentionBackend), "mask": (masks, Mask), "workload": (workloads, Workload)}
IMPORTS = """
from fa_research.backends.torch_backend import TorchBackend
from fa_research.backends import AttentionBackend
from fa_research.masks import Causal, Mask
from fa_research.workloads import Workload
from fa_research.workloads.decode import Decode
"""


def problem(kind: str, source: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    package, base = BASES[kind]
    reserved = ["auto"] if kind == "backend" else []
    with pytest.raises(ConfigError) as error:
        discovery.discover(package.__name__, base, [module], reserved)  # type: ignore[type-abstract]
    sys.modules.pop(module, None)
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "body", "said"),
    [
        (
            "backend", "class Mine(AttentionBackend):\n    name = 'mine'",
            "backend mine (MODULE.Mine) lacks attend, capabilities, unavailable; write what ARCHITECTURE.md says of "
            "adding a backend",
        ),
        ("mask", "class Mine(Mask):\n    name = 'mine'", "mask mine (MODULE.Mine) lacks allows, band; "),
        ("workload", "class Mine(Workload):\n    name = 'mine'", "workload mine (MODULE.Mine) lacks "),
        (
            "backend", "class Mine(TorchBackend):\n    name = 'torch'",
            "two backends have the name torch, fa_research.backends.torch_backend.TorchBackend and MODULE.Mine; give "
            "one another name",
        ),
        ("mask", "class Mine(Causal):\n    name = 'causal'", "two masks have the name causal, "),
        ("workload", "class Mine(Decode):\n    name = 'decode'", "two workloads have the name decode, "),
        (
            "backend", "class A(TorchBackend):\n    name = 'x'\n\n\nclass B(TorchBackend):\n    name = 'x'",
            "two backends have the name x, MODULE.A and MODULE.B; ",
        ),
        ("backend", "class A(TorchBackend):\n    name = 'auto'", "backend MODULE.A: the name auto has a meaning"),
        ("backend", "class A(TorchBackend):\n    name = 3", "backend MODULE.A: its name is 3; give a text"),
    ],
)  # fmt: skip
def test_a_class_that_is_no_choice(
    kind: str,
    body: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    module = f"plugin_{abs(hash(request.node.name))}"
    line = problem(kind, f"{IMPORTS}\n\n{body}\n", module, tmp_path, monkeypatch)
    assert line.startswith(f"FA_RESEARCH_PLUGINS={module}: {said.replace('MODULE', module)}"), line


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def half(\n", "SyntaxError: '(' was never closed (MODULE.py, line 1)"),
        (
            "\nimport json\njson.loads('x')\n",
            "JSONDecodeError: Expecting value: line 1 column 1 (char 0) (MODULE.py:3)",
        ),
        ("import sys\nsys.exit('no GPU')\n", "SystemExit: no GPU (MODULE.py:2)"),
    ],
)
def test_a_module_that_cannot_be_imported_names_its_own_line(
    source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    module = f"plugin_{abs(hash(request.node.name))}"
    line = problem("backend", source, module, tmp_path, monkeypatch)
    assert f"FA_RESEARCH_PLUGINS={module}: cannot be imported: {said.replace('MODULE', module)};" in line


def test_a_name_that_begins_like_the_plugins_is_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("import mine_too\n")
    (tmp_path / "mine_too.py").write_text(f"{IMPORTS}\n\nclass A(TorchBackend):\n    name = 'not_named'\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "not_named" not in discovery.discover(backends.__name__, AttentionBackend, ["mine"])  # type: ignore[type-abstract]


def test_a_class_made_twice_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`slots=True` makes a second class of the first, which stays among the subclasses."""
    source = f"{IMPORTS}\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n\n\n"
    source += "@dataclass(frozen=True, slots=True)\nclass A(Causal):\n    name: ClassVar[str] = 'slotted'\n"
    (tmp_path / "slotted.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    found = discovery.discover(masks.__name__, Mask, ["slotted"])  # type: ignore[type-abstract]
    assert found["slotted"] is vars(sys.modules["slotted"])["A"]


def test_a_plugin_that_dies_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dies.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FA_RESEARCH_PLUGINS", "dies")
    with pytest.raises(ConfigError, match="=dies: cannot be imported: it ended its process by SIGKILL"):
        plugins.check_apart()
