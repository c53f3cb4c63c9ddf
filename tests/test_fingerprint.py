"""The fingerprint of the code: which files it covers, what it says has changed, and when it is taken."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fa_research import fingerprint
from fa_research.fingerprint.plugin_files import files_of_plugin


@pytest.fixture
def taken_anew() -> Iterator[None]:
    """Digests are kept for the life of a process; here each test is a process."""
    for kept in (fingerprint._package, fingerprint._plugin):
        kept.cache_clear()
    yield
    for kept in (fingerprint._package, fingerprint._plugin):
        kept.cache_clear()


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken_anew: None) -> Path:
    """A plugin of several files in a folder of its own, of which none may be run."""
    folder = tmp_path / "plugin"
    (folder / "my_lib" / "deep").mkdir(parents=True)
    never = "raise AssertionError('it was run')\n"
    (folder / "my_backend.py").write_text(
        f"import os, numpy, torch\nimport my_kernels\ndef later():\n    from my_lib.deep import tiles\n{never}"
    )
    (folder / "my_kernels.py").write_text(
        "from fa_research.backends import torch_backend\nimport my_backend\n"
    )
    (folder / "my_lib" / "__init__.py").write_text(never)
    (folder / "my_lib" / "deep" / "__init__.py").write_text("")
    (folder / "my_lib" / "deep" / "tiles.py").write_text("from . import sizes\nfrom ..other import x\n")
    (folder / "my_lib" / "deep" / "sizes.py").write_text("def (")  # a file that is not Python yet
    (folder / "my_lib" / "other.py").write_text("x = 1\n")
    (folder / "my_lib" / "unused.py").write_text("")
    (folder / "attend.cu").write_text("// one\n")
    (folder / "README.md").write_text("# mine\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("FA_RESEARCH_PLUGINS", "my_backend")
    return folder


def test_a_plugin_is_its_file_and_those_that_it_imports(plugin: Path) -> None:
    found = files_of_plugin("my_backend")
    lib = ["my_lib", "my_lib.deep", "my_lib.deep.sizes", "my_lib.deep.tiles", "my_lib.other"]
    assert sorted(found) == ["my_backend", "my_kernels", *lib]
    assert [path.name for path in found["my_backend"]] == ["my_backend.py", "attend.cu"]
    assert files_of_plugin("nowhere") == {} == files_of_plugin("my_backend.inner")
    assert not {"my_backend", "my_kernels", "my_lib"} & set(sys.modules)


def test_packages_that_pip_put_into_a_folder_are_not_the_users(plugin: Path, tmp_path: Path) -> None:
    (tmp_path / "target" / "numba-1.dist-info").mkdir(parents=True)
    (tmp_path / "target" / "numba_like.py").write_text("")
    sys.path.append(str(tmp_path / "target"))
    try:
        with (plugin / "my_kernels.py").open("a") as file:
            file.write("import numba_like\n")
        assert "numba_like" not in files_of_plugin("my_backend")
        assert list(files_of_plugin("numba_like")) == ["numba_like"], "a plugin itself may be installed"
    finally:
        sys.path.remove(str(tmp_path / "target"))


@pytest.mark.parametrize(
    ("edited", "said"),
    [
        ("my_backend.py", ["my_backend.py"]),
        ("my_lib/other.py", ["my_lib/other.py"]),
        ("attend.cu", ["my_backend.py", "my_kernels.py"]),
        ("my_lib/unused.py", []),
        ("README.md", []),
    ],
)
def test_what_changed_of_a_plugin_is_named(plugin: Path, edited: str, said: list[str]) -> None:
    before = fingerprint.fingerprint()
    assert fingerprint.changes(before) == []
    with (plugin / edited).open("a") as file:
        file.write("# edited\n")
    assert fingerprint.changes(before) == [], "this process has imported the old code"
    assert fingerprint.fingerprint() == before
    fingerprint._plugin.cache_clear()
    assert fingerprint.changes(before) == said


def test_a_plugin_that_is_gone_has_changed(plugin: Path) -> None:
    before = fingerprint.fingerprint()
    (plugin / "my_kernels.py").unlink()
    fingerprint._plugin.cache_clear()
    assert fingerprint.changes(before) == ["my_kernels.py"]


def test_a_row_names_the_plugins_that_it_used(plugin: Path) -> None:
    theirs = type("Mine", (), {"__module__": "my_kernels"})
    assert "my_kernels" in fingerprint.fingerprint([theirs])["plugins"]
    assert "plugins" not in fingerprint.fingerprint([Path, dict])


@pytest.mark.parametrize(
    ("edited", "said"),
    [
        ("backends/flex.py", ["fa_research/backends"]),
        ("runner.py", ["fa_research/runner.py"]),
        ("engine/new.py", ["fa_research/engine"]),
        ("compare/page.py", []),
        ("sweep/view.py", []),
        ("cli.py", []),
        ("../README.md", []),
        ("../tests/test_x.py", []),
        ("backends/notes.md", []),
    ],
)
def test_what_changed_of_the_package_is_named_where_it_measures(
    edited: str, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken_anew: None
) -> None:
    package = tmp_path / "fa_research"
    for name in ("backends/__init__.py", "backends/flex.py", "runner.py", "engine/__init__.py", "cli.py",
                 "compare/__init__.py", "sweep/__init__.py"):  # fmt: skip
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("")
    monkeypatch.setattr(fingerprint, "PACKAGE", package)
    before = fingerprint.fingerprint()
    (package / edited).parent.mkdir(exist_ok=True)
    (package / edited).write_text("# edited\n")
    fingerprint._package.cache_clear()
    assert fingerprint.changes(before) == said
    assert (fingerprint.fingerprint()["package"] != before["package"]) == bool(said)
