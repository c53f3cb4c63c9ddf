"""Masks of plugins, and masks with several parameters, as a config gives them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fa_research import backends, masks
from fa_research.config import Config, MaskConfig, config_hash, load_config, to_plain
from fa_research.config.store import register
from fa_research.errors import ConfigError, Unsupported
from fa_research.masks import Streaming
from fa_research.models import attention_specs
from tests.helpers import Scene, make_spec
from tests.test_checkpoint_config import composed

SOURCE = """
from dataclasses import dataclass
from typing import ClassVar

from fa_research.masks import Mask


@dataclass(frozen=True)
class Strided(Mask):
    stride: int
    share: float = 0.5
    also_self: bool = True
    how: str = "every"
    name: ClassVar[str] = "strided"

    def allows(self, q_pos, k_pos):
        return (k_pos <= q_pos) & ((k_pos % self.stride == 0) | (k_pos == q_pos))

    def band(self):
        return None
"""


@pytest.fixture
def strided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The plugin's mask is there, and forgotten afterwards."""
    (tmp_path / "strided_plugin.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FA_RESEARCH_PLUGINS", "strided_plugin")
    masks._registry.cache_clear()
    yield
    sys.modules.pop("strided_plugin", None)
    masks._registry.cache_clear()


def test_options_reach_the_layers(strided: None) -> None:
    config = load_config(
        composed(
            "model=tiny", "model.mask.name=streaming", "model.mask.size=32", "+model.mask.options.sink_tokens=2",
            "model.local.pattern=[true,false]", "model.local.mask.name=strided", "model.local.mask.size=null",
            "+model.local.mask.options.stride=3", "+model.local.mask.options.share=1",
        )
    )  # fmt: skip
    local, other = (spec.mask for spec in attention_specs(config.model))
    assert other == Streaming(32, 2)
    assert str(local) == "Strided(stride=3, share=1.0, also_self=True, how='every')"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ([], "model.mask: mask name=strided needs options.stride"),
        (["+model.mask.options.strid=3"], "options.strid is unknown; its options: stride, share, also_self, how"),
        (["+model.mask.options.stride=3.5"], "options.stride=3.5: expected an integer"),
        (["+model.mask.options.stride=true"], "options.stride=True: expected an integer"),
        (["+model.mask.options.stride=3", "+model.mask.options.also_self=1"], "also_self=1: expected true or false"),
        (["+model.mask.options.stride=3", "+model.mask.options.how=1"], "options.how=1: expected text"),
        (["+model.mask.options.stride=3", "+model.mask.options.share=x"], "options.share=x: expected a number"),
        (["model.mask.size=3"], "mask name=strided takes no size, got size=3"),
        (["model.mask.name=streaming", "+model.mask.options.size=3"], "options.size=3: give size=3 beside the name"),
        (["model.mask.name=streaming"], "mask name=streaming needs size"),
        (["model.mask.name=causal", "+model.mask.options.a=3"], "options.a is unknown; its options: none"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(strided: None, typed: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(composed("model=tiny", "model.mask.name=strided", *typed))
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (SOURCE.replace("(frozen=True)", ""), "is no frozen dataclass"),
        (SOURCE.replace("stride: int", "stride: list"), "the field stride is of type"),
    ],
)
def test_a_class_that_no_config_can_build(body: str, said: str, strided: None, tmp_path: Path) -> None:
    (tmp_path / "strided_plugin.py").write_text(body)
    with pytest.raises(ConfigError, match=said):
        masks.names()


def test_hashes() -> None:
    """Options count, and a config without any keeps the hash that it had before there were options."""
    register()
    plain = to_plain(Config())
    before = to_plain(Config())
    del before["model"]["mask"]["options"], before["model"]["local"]["mask"]["options"]
    assert config_hash(plain) == config_hash(before) == config_hash(Config())
    config = Config()
    config.model.mask = MaskConfig("streaming", 8, {"sink_tokens": 1})
    other = Config()
    other.model.mask = MaskConfig("streaming", 8, {"sink_tokens": 2})
    assert len({config_hash(config), config_hash(other), config_hash(Config())}) == 3
    path = [
        "model.path=pkg://fa_research/checkpoints/pybyte",
        "model.mask.name=streaming",
        "model.mask.size=8",
    ]
    some, more = path, [*path, "+model.mask.options.sink_tokens=1"]
    cells = [composed(*typed) for typed in (some, more)]
    unread = [config_hash(cell, typed) for cell, typed in zip(cells, (some, more), strict=True)]
    read = [load_config(cell, typed) for cell, typed in zip(cells, (some, more), strict=True)]
    assert unread == [config_hash(config) for config in read] and unread[0] != unread[1]
    assert read[1].model.changed == ["mask.name", "mask.size", "mask.options"]
    assert read[1].model.mask.options == {"sink_tokens": 1}


@pytest.mark.parametrize("name", ["torch", "flex", "jax"])
@pytest.mark.parametrize("decode", [False, True])
def test_backends_that_evaluate_predicates(name: str, decode: bool) -> None:
    lens = ((0, 1), (15, 1), (40, 1)) if decode else ((0, 17), (16, 5), (31, 9))
    scene = Scene(make_spec(mask=Streaming(6, 3)), lens, 16, torch.float32, decode=decode)
    scene.check(scene.backend(name))


def test_backends_of_bands_refuse_it() -> None:
    scene = Scene(make_spec(mask=Streaming(6, 3)), ((0, 4),), 16, torch.float32)
    with pytest.raises(
        Unsupported, match="mask streaming: it is no band, and the kernel evaluates bands only"
    ):
        backends.create("triton", scene.settings(), scene.specs)
