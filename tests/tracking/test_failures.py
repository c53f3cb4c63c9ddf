"""Where a failure came from: the line that its author wrote."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch

from fa_research.backends.torch_backend import TorchBackend
from fa_research.tracking.failures import failed_row, log_bug
from tests.helpers import Scene, make_spec

SOURCE = """
import torch
from fa_research.backends.torch_backend import TorchBackend


class Mine(TorchBackend):
    def attend(self, call):
        return torch.einsum("abc,d->e", call.q_THD, call.q_THD), None
"""


def error_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exception:
    """An error that torch's own Python code raises below a plugin's `attend`."""
    (tmp_path / "mine.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("mine", None)
    import mine  # type: ignore[import-not-found]

    scene = Scene(make_spec(), ((0, 3),), 4, torch.float32)
    backend: TorchBackend = mine.Mine(scene.settings(), scene.specs)
    with pytest.raises(RuntimeError) as error:
        scene.run(backend)
    return error.value


def test_the_row_names_the_line_of_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA_RESEARCH_PLUGINS", "mine")
    (reason,) = failed_row(error_of(tmp_path, monkeypatch)).reasons
    assert reason.startswith("RuntimeError: einsum") and reason.endswith("(mine.py:8)")


def test_the_log_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FA_RESEARCH_PLUGINS", "mine")
    log_bug(logging.getLogger("fa_research.test"), error_of(tmp_path, monkeypatch))
    assert "Traceback" in caplog.text and "functional.py" in caplog.text, "nothing of the traceback is lost"
    assert caplog.records[-1].getMessage() == (
        f"raised by {tmp_path / 'mine.py'}, line 8, in attend: "
        'return torch.einsum("abc,d->e", call.q_THD, call.q_THD), None'
    )


def test_without_plugins_it_is_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FA_RESEARCH_PLUGINS", raising=False)
    (reason,) = failed_row(error_of(tmp_path, monkeypatch)).reasons
    assert "(base.py:" in reason
