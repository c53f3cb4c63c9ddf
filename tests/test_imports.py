"""The layers of the package: a module imports from its own layer or from below, also inside functions."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fa_research"

LAYERS: dict[str, int] = {
    **dict.fromkeys(
        [
            "errors",
            "discovery",
            "fingerprint",
            "phases",
            "streams",
            "text",
            "config",
            "spec",
            "masks",
            "kernels",
        ],
        0,
    ),
    "kv_cache": 1,
    **dict.fromkeys(["batch", "metadata"], 2),
    "attention": 3,
    **dict.fromkeys(["backends", "interop"], 4),  # a backend shares tensors; JAX code calls a backend
    "models": 5,
    "engine": 6,
    "workloads": 7,
    **dict.fromkeys(["measure", "plugins"], 8),
    "tracking": 9,
    **dict.fromkeys(["runner", "compare"], 10),
    **dict.fromkeys(["isolation", "sweep"], 11),
    "cli": 12,
}
LEAVES = {"errors", "phases", "streams", "text", "kernels"}  # import nothing else of the package
HEAVY = {
    "torch",
    "triton",
    "jax",
    "jaxlib",
    "wandb",
    "transformers",
    "flash_attn",
    "flashinfer",
    "kernels",
    "vllm",
    "altair",
    "vl_convert",
}
WITHOUT_TORCH = {
    "errors",
    "fingerprint",
    "streams",
    "text",
    "config",
    "spec",
    "masks",
    "cli",
    "tracking",
    "compare",
}  # what --help and completion may load


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part_of(path: Path) -> str:
    """The part of the package that a file belongs to: its folder, or its own name at the top."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST, path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, wherever in it the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
                base = ".".join([*package, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def parts_imported(path: Path) -> set[str]:
    names = {tuple(name.split(".")) for name in imported(ast.parse(path.read_text()), path)}
    return {name[1] for name in names if name[0] == "fa_research" and len(name) > 1 and name[1] in LAYERS}


def ids(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", modules(), ids=ids)
def test_imports_go_downward_only(path: Path) -> None:
    part = part_of(path)
    assert part in LAYERS, f"{part} has no layer yet: give it one in LAYERS"
    upward = {other for other in parts_imported(path) if LAYERS[other] > LAYERS[part]}
    assert not upward, f"{part} (layer {LAYERS[part]}) imports {sorted(upward)} from above"
    if part in LEAVES:
        assert parts_imported(path) <= {part}


def test_the_check_sees_every_form_of_import(tmp_path: Path) -> None:
    # The rule is only as good as the parser above: it must see lazy, relative and aliased imports.
    source = "import fa_research.engine as e\ndef f():\n    from .. import runner\n    from fa_research import cli\n"
    found = set(imported(ast.parse(source), PACKAGE / "kv_cache" / "pool.py"))
    assert found == {"fa_research.engine", "fa_research.runner", "fa_research.cli"}


@pytest.mark.parametrize("path", [p for p in modules() if part_of(p) in WITHOUT_TORCH], ids=ids)
def test_light_parts_import_nothing_heavy_at_their_top(path: Path) -> None:
    body = [
        node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    top = {name.split(".")[0] for node in body for name in imported(node, path)}
    assert not top & HEAVY


@pytest.mark.parametrize(
    "statement",
    [
        "import fa_research",
        "import fa_research.config, fa_research.errors, fa_research.spec, fa_research.masks",
        "import fa_research.cli",
        "import fa_research.tracking",
        "import fa_research.compare.__main__, fa_research.compare.screen, fa_research.compare.report",
    ],
)
def test_importing_light_parts_loads_nothing_heavy(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
