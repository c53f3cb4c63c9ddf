"""GPU tests of `fa2` and `fa3` skip where no package offers the kernels, and for no other reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fa_research.backends.flash_attn_providers import resolve

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.gpu
@pytest.mark.parametrize("version", [2, 3])
def test_kernels_that_a_user_would_get_are_found_by_the_tests(version: int) -> None:
    """Here warnings are errors: a package that warns when it is imported would look as if it were missing."""
    code = (
        f"from fa_research.backends.flash_attn_providers import resolve; print(resolve({version}, None)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    provider, reasons = resolve(version, None)
    assert (provider is None) == (done.stdout.strip().splitlines()[-1] == "None"), reasons
