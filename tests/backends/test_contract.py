"""What a backend may not return: said in one line, with what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fa_research.attention.call import AttentionCall
from fa_research.backends.contract import checked
from fa_research.backends.torch_backend import TorchBackend
from fa_research.errors import BackendFault
from fa_research.metadata import FlashAttentionMetadata
from fa_research.spec import Capabilities
from tests.helpers import Scene, make_spec

LENS = ((0, 3), (5, 2))  # 5 new tokens; the spec has 4 query heads of 64
Spoil = Callable[[Tensor, Tensor | None], Any]


class Returns(TorchBackend):
    """Right but for what `spoil` makes of it; without sinks, so that a layer with sinks asks for its LSE."""

    spoil: Spoil

    @property
    def capabilities(self) -> Capabilities:
        can = super().capabilities
        return Capabilities(can.devices, can.dtypes, can.mask_features, returns_lse=True)

    def attend(self, call: AttentionCall) -> Any:
        out, lse = super().attend(call)
        return self.spoil(out, lse)


def run(spoil: Spoil, has_sink: bool = False) -> None:
    scene = Scene(make_spec(has_sink=has_sink), LENS, 4, torch.float32)
    backend = Returns(scene.settings(), scene.specs)
    backend.spoil = spoil
    scene.run(backend)


EXPECTED = "expected [5,4,64] float32"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda out, lse: (out[:, :3].double(), lse), f"[5,3,64] float64, {EXPECTED}"),
        (lambda out, lse: (out[:4], lse), f"[4,4,64] float32, {EXPECTED}"),
        (lambda out, lse: (out.half(), lse), f"[5,4,64] float16, {EXPECTED}"),
        (lambda out, lse: (out.flatten(1), lse), f"[5,256] float32, {EXPECTED}"),
        (lambda out, lse: (out[None], lse), f"[1,5,4,64] float32, {EXPECTED}"),
        (lambda out, lse: (out.to("meta"), lse), f"[5,4,64] float32 on meta, {EXPECTED} on cpu"),
        (lambda out, lse: (out.tolist(), lse), f"a value of type list, {EXPECTED}"),
        (lambda out, lse: (None, lse), f"None, {EXPECTED}"),
        (lambda out, lse: out, "[5,4,64] float32, expected the pair (output, LSE or None)"),
        (lambda out, lse: None, "None, expected the pair (output, LSE or None)"),
        (lambda out, lse: (out, lse, lse), "tuple of 3, expected the pair (output, LSE or None)"),
    ],
)
def test_a_wrong_output_is_one_line(spoil: Spoil, said: str) -> None:
    with pytest.raises(BackendFault) as error:
        run(spoil)
    assert str(error.value) == f"backend torch returned {said}"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda out, lse: (out, None), "as LSE None, expected [5,4] float32"),
        (lambda out, lse: (out, lse.T), "as LSE [4,5] float32, expected [5,4] float32"),
        (lambda out, lse: (out, lse.double()), "as LSE [5,4] float64, expected [5,4] float32"),
        (
            lambda out, lse: (out.half(), lse.to("meta")),
            f"[5,4,64] float16, {EXPECTED}; and as LSE [5,4] float32 on meta, expected [5,4] float32 on cpu",
        ),
    ],
)
def test_a_wrong_lse_is_one_line_where_it_was_asked_for(spoil: Spoil, said: str) -> None:
    with pytest.raises(BackendFault) as error:
        run(spoil, has_sink=True)
    assert str(error.value) == f"backend torch returned {said}"


def test_an_lse_that_nobody_asked_for_is_not_looked_at() -> None:
    run(lambda out, lse: (out, "nothing"))


def test_padding_needs_no_result() -> None:
    """Calls from JAX may have more tokens than their last cumulative length."""
    q_THD = torch.zeros(7, 4, 64)
    caches = (torch.zeros(16, 2, 64), torch.zeros(16, 2, 64))
    call = AttentionCall(q_THD, *caches, FlashAttentionMetadata.allocate(2, 16, 4, "cpu"), make_spec())
    out, _ = checked((q_THD[:5], None), call, "torch", padded=True)
    assert out.shape[0] == 5
    with pytest.raises(BackendFault, match=r"returned \[5,4,64\] float32, expected \[7,4,64\] float32"):
        checked((q_THD[:5], None), call, "torch")
    with pytest.raises(BackendFault, match=r"returned \[5,1,64\] float32, expected \[5,4,64\] float32"):
        checked((q_THD[:5, :1], None), call, "torch", padded=True)  # a copy would spread it over all heads
