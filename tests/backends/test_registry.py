"""Finding, choosing and refusing backends: errors list every reason and what would work."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch

from fa_research import backends
from fa_research.backends import AttentionBackend, BackendSettings
from fa_research.backends.preference import BY_GPU, Preference, preference
from fa_research.backends.torch_backend import TorchBackend
from fa_research.errors import BackendUnavailable, ConfigError, Unsupported
from fa_research.masks import Chunked
from fa_research.spec import AttentionSpec
from tests.helpers import make_spec

SPEC = make_spec()
NO_GPU = pytest.mark.skipif(
    torch.cuda.is_available(), reason="says what is missing on a machine without a GPU"
)


def settings(
    device: str = "cpu", dtype: torch.dtype = torch.float16, page_size: int = 16, **more: Any
) -> BackendSettings:
    return BackendSettings(torch.device(device), dtype, page_size, max_context_len=128, **more)


def test_names() -> None:
    assert {"torch", "triton", "fa3", "fa2"} <= set(backends.names())
    assert list(backends.names()) == sorted(backends.names())
    assert "auto" not in backends.names()


def test_a_class_outside_the_package_is_not_registered() -> None:
    class Elsewhere(TorchBackend):
        name = "elsewhere"

    assert Elsewhere in TorchBackend.__subclasses__()
    assert "elsewhere" not in backends._registry.__wrapped__(), "what names() remembers was looked up before"


@pytest.mark.parametrize("name", ["flash", "", "Torch", "auto"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        backends.create(name, settings(), [SPEC])
    assert f"backend.name={name} is unknown" in str(error.value)
    assert all(choice in str(error.value) for choice in ("auto", *backends.names()))


@pytest.mark.parametrize(("name", "options"), [("torch", "none"), ("triton", "gather")])
def test_unknown_option(name: str, options: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"backend\.options\.speed is unknown to backend={name}; its options: {options}$"
    ):
        backends.create(name, settings("cpu", options={"speed": 11}), [SPEC])


def test_create_gives_the_backend_with_one_lowering_a_layer() -> None:
    specs = [SPEC, make_spec(mask=Chunked(8)), SPEC]
    backend = backends.create("torch", settings(), specs)
    assert backend.name == "torch" and isinstance(backend, AttentionBackend)
    assert [lowering.spec for lowering in backend.lowerings] == specs


@NO_GPU
@pytest.mark.parametrize("name", ["fa3", "fa2"])
def test_unavailable_lists_what_would_work(name: str) -> None:
    with pytest.raises(BackendUnavailable) as error:
        backends.create(name, settings(), [SPEC])
    assert {"torch", "triton"} <= set(error.value.alternatives)
    text = str(error.value)
    assert text.startswith(f"backend={name} is not available here: needs an NVIDIA")
    assert "no CUDA device" in text and "Backends that would work here: " in text


@NO_GPU
def test_alternatives_are_tried_with_the_same_layers() -> None:
    """The Triton interpreter takes no bfloat16, so only the oracle is left."""
    with pytest.raises(BackendUnavailable) as error:
        backends.create("fa3", settings(dtype=torch.bfloat16), [SPEC])
    assert "torch" in error.value.alternatives and "triton" not in error.value.alternatives


@NO_GPU
def test_options_of_the_refused_backend_do_not_count_against_the_others() -> None:
    asked = settings(provider="vllm.vllm_flash_attn", num_splits=4, options={"only_for_fa3": 1})
    with pytest.raises(BackendUnavailable) as error:
        backends.create("fa3", asked, [SPEC])
    assert {"torch", "triton"} <= set(error.value.alternatives)


@NO_GPU
def test_unsupported_lists_every_reason_once() -> None:
    bad = replace(SPEC, head_dim=100, v_head_dim=100)
    with pytest.raises(Unsupported) as error:
        backends.create("triton", settings(dtype=torch.bfloat16), [SPEC, bad, bad])
    assert "torch" in error.value.alternatives and "triton" not in error.value.alternatives
    reasons = error.value.reasons
    assert len(reasons) == len(set(reasons)) == 2
    assert (
        "dtype bfloat16: takes float16, float32" in reasons[0]
        and "head dim 100: takes multiples of 8 up to 256" in reasons[1]
    )
    assert str(error.value).startswith("backend=triton does not support this combination: ")


def test_one_layer_of_many_may_be_the_reason() -> None:
    odd = replace(SPEC, head_dim=36, v_head_dim=36)
    assert backends.reasons_against("triton", settings(), [SPEC] * 3) == ()
    assert len(backends.reasons_against("triton", settings(), [SPEC, SPEC, odd])) == 1


def test_refusals_survive_pickling() -> None:
    """Process-based launchers send errors back that way."""
    error = Unsupported("triton", ["a", "b"], ["torch"])
    again = pickle.loads(pickle.dumps(error))
    assert (again.name, again.reasons, again.alternatives, str(again)) == (
        "triton",
        ("a", "b"),
        ("torch",),
        str(error),
    )


@NO_GPU
def test_auto_takes_torch_on_the_cpu_and_says_why() -> None:
    backend, why = backends.choose(settings(), [SPEC])
    assert (backend.name, why) == (
        "torch",
        "on this device the others are for tests only",
    )


def test_auto_goes_down_the_measured_order_and_says_what_it_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []

    def kind(backend: str, reasons: tuple[str, ...] = ()) -> type[AttentionBackend]:
        def init(self: TorchBackend, *args: Any) -> None:
            made.append(backend)
            TorchBackend.__init__(self, *args)

        members = {
            "name": backend,
            "unavailable": classmethod(lambda cls, settings: reasons),
            "__init__": init,
        }
        return type(backend, (TorchBackend,), members)

    found = [kind("slow"), kind("absent", ("no such chip",)), kind("fast"), kind("never")]
    monkeypatch.setattr(backends, "_registry", lambda: {cls.name: cls for cls in found})
    order = Preference(("absent", "fast", "slow"), "in the order of this test")
    monkeypatch.setattr(backends, "preference", lambda device: order)
    backend, why = backends.choose(settings(), [SPEC])
    assert (backend.name, why) == ("fast", "not absent (no such chip); in the order of this test")
    assert made == ["fast"], "each backend is made once"
    backend, why = backends.choose(
        settings(), [SPEC], also=lambda backend: ["too fast"] if backend.name == "fast" else []
    )
    assert backend.name == "slow" and why.startswith("not absent (no such chip); not fast (too fast)")


def test_every_backend_of_the_order_exists() -> None:
    for preferred in [*BY_GPU.values(), preference(torch.device("cpu"))]:
        assert set(preferred.order) <= set(backends.names()) and preferred.order[-1] == "torch"


def test_auto_where_nothing_works_lists_what_was_tried() -> None:
    with pytest.raises(BackendUnavailable) as error:
        backends.choose(settings("meta"), [SPEC])
    assert "backend=auto is not available here" in str(error.value)
    assert any("torch" in reason and "device meta" in reason for reason in error.value.reasons)


@pytest.mark.gpu
def test_auto_on_the_gpu_takes_the_fastest_that_supports_the_layers() -> None:
    order = preference(torch.device("cuda", 0)).order
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        asked = settings("cuda", dtype)
        backend, why = backends.choose(asked, [SPEC])
        name = backend.name
        assert name == next(other for other in order if not backends.reasons_against(other, asked, [SPEC]))
        for before in order[: order.index(name)]:
            assert f"not {before} (" in why
    assert name == "torch" and "dtype float64" in why


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fa3", "fa2"])
def test_an_unknown_provider_on_the_gpu(name: str) -> None:
    with pytest.raises(
        BackendUnavailable, match=r"backend\.provider=nonsense is unknown for FA[23]; choose one of"
    ) as error:
        backends.create(name, settings("cuda", provider="nonsense"), [SPEC])
    assert {"torch", "triton"} <= set(error.value.alternatives)


@pytest.mark.gpu
def test_triton_on_the_cpu_of_a_gpu_machine_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailable, match="TRITON_INTERPRET=1"):
        backends.create("triton", settings("cpu"), [SPEC])


@pytest.mark.gpu
def test_what_a_backend_says_it_can_is_what_lowering_accepts() -> None:
    """On this GPU each available backend accepts plain causal attention in bfloat16; float64 is torch's alone."""
    for name in backends.names():
        asked = settings("cuda", torch.bfloat16, page_size=256)
        if backends._registry()[name].unavailable(asked):
            continue
        assert backends.reasons_against(name, asked, [SPEC]) == ()
        assert (backends.reasons_against(name, replace(asked, dtype=torch.float64), [SPEC]) == ()) == (
            name == "torch"
        )


def test_specs_are_what_the_message_talks_about() -> None:
    """A sweep's row shows the reasons as they are: they name the key or the quantity, and what would work."""
    spec = AttentionSpec(4, 2, 64, 64, 0.1)
    (reason,) = backends.reasons_against("triton", settings(dtype=torch.float64), [spec])
    assert reason == "dtype float64: takes float16, float32" or torch.cuda.is_available()


def test_the_definition_has_no_splits() -> None:
    """Ignoring the key would make a sweep over it look as if it changed nothing."""
    with pytest.raises(Unsupported, match=r"backend.num_splits=4.*use 0"):
        backends.create("torch", settings(num_splits=4), [SPEC])


@pytest.mark.parametrize(
    "methods",
    [
        {"attend": lambda self, q, k, v, metadata, spec, *, sinks_H=None, return_lse=False: None},
        {"forward_decode": lambda self, *args, **kwargs: None},
        {"attend_into": lambda self, out, *args, **kwargs: None},
    ],
)
def test_a_backend_for_the_contract_before_attention_calls_is_told_what_changed(
    methods: dict[str, Any],
) -> None:
    with pytest.raises(
        TypeError, match=rf"Old.{min(methods)}: backends implement attend\(self, call\).*README"
    ):
        type("Old", (TorchBackend,), methods)


def test_triton_without_a_gpu_and_without_the_interpreter_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        BackendUnavailable, match="TRITON_INTERPRET=0.: leave that variable out or set it to 1"
    ):
        backends.create("triton", settings("cpu"), [SPEC])
