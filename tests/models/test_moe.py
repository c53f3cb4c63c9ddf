"""The mixture of experts against transformers' own layers, through checkpoints as transformers saves them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fa_research.config import Activation, ModelConfig, MoEConfig
from fa_research.models.experts import ARCHITECTURES, Target, dequantise_mxfp4, expert_targets
from fa_research.models.moe import MoE, choose_path, route
from tests.models.checkpoints import safetensors, transformers

HIDDEN, INNER, PREFIX = 64, 32, "model.layers.1."
COMMON = {
    "vocab_size": 32, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "num_experts_per_tok": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A peer in transformers: `options` of its config, `moe` and `activation` of ours."""

    options: dict[str, Any]
    moe: MoEConfig
    activation: Activation = Activation.silu


QWEN = {"num_experts": 8, "moe_intermediate_size": INNER, "intermediate_size": 40}
PACKED = {"num_local_experts": 8, "intermediate_size": INNER}
FAMILIES = {
    "Mixtral": Family(PACKED, MoEConfig(8, 3)),
    "Qwen3Moe": Family({**QWEN, "norm_topk_prob": True}, MoEConfig(8, 3)),
    "Qwen3Moe-unnormed": Family({**QWEN, "norm_topk_prob": False}, MoEConfig(8, 3, norm_topk_prob=False)),
    "GptOss": Family(PACKED, MoEConfig(8, 3, bias=True), Activation.swiglu_clamped),
}


def architecture_of(name: str) -> str:
    return f"{name.split('-')[0]}ForCausalLM"


def build_ours(family: Family, dtype: torch.dtype) -> MoE:
    """Filled with NaN, so that a tensor which is not loaded shows."""
    config = ModelConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, moe=family.moe, activation=family.activation
    )
    moe = MoE(config, dtype=dtype, device="cpu")
    for parameter in moe.parameters():
        parameter.fill_(float("nan"))
    return moe


def fill(targets: dict[str, Target], tensors: dict[str, Tensor]) -> set[str]:
    """Write every target from the tensors of a checkpoint, whose shapes must be as announced; the names used."""
    used: set[str] = set()
    for target in targets.values():
        for name, shape in target.sources.items():
            assert tuple(tensors[name].shape) == shape, name
        target.write(*(tensors[name] for name in target.sources))
        used |= target.sources.keys()
    return used


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[torch.nn.Module, MoE]:
    """The second layer's mixture of experts of a model that transformers saved, theirs and ours, in float64."""
    family, architecture = FAMILIES[request.param], architecture_of(request.param)
    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class(**COMMON | family.options)).double().eval()
    model.set_experts_implementation("eager")  # its own grouped_mm refuses float64
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.4, generator=generator)
    folder: Path = tmp_path_factory.mktemp("moe")
    model.save_pretrained(folder)
    tensors = safetensors.load_file(folder / "model.safetensors")
    ours = build_ours(family, torch.float64)
    used = fill(expert_targets(architecture, ours, PREFIX, tensors.keys()), tensors)
    assert used == {name for name in tensors if name.startswith(PREFIX) and ("mlp" in name or "moe" in name)}
    return model.model.layers[1].mlp, ours


def inputs(tokens: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64
    ).to(dtype)


def expected(theirs: torch.nn.Module, x_TE: Tensor) -> Tensor:
    with torch.no_grad():
        out = theirs(x_TE[None])
    return (out[0] if isinstance(out, tuple) else out)[0]


def with_path(moe: MoE, x_TE: Tensor, path: str) -> Tensor:
    return moe.experts(x_TE, torch.nn.functional.linear(x_TE, moe.router, moe.router_bias), path)


@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_float64_is_what_transformers_computes(pair: tuple[torch.nn.Module, MoE], tokens: int) -> None:
    # transformers rounds the weights of Mixtral's and Qwen3-MoE's routers to float32
    theirs, ours = pair
    x_TE = inputs(tokens)
    assert choose_path(x_TE, ours.gate_up, ours.down) == "dense"
    torch.testing.assert_close(ours(x_TE), expected(theirs, x_TE), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_float32_takes_the_grouped_product(pair: tuple[torch.nn.Module, MoE], tokens: int) -> None:
    theirs, exact = pair
    ours = build_like(exact, torch.float32)
    x_TE = inputs(tokens, torch.float32)
    assert choose_path(x_TE, ours.gate_up, ours.down) == "grouped_mm"
    wanted = expected(theirs, x_TE.double())
    torch.testing.assert_close(ours(x_TE).double(), wanted, rtol=1e-4, atol=1e-4 * wanted.std().item())
    torch.testing.assert_close(
        with_path(ours, x_TE, "dense").double(), wanted, rtol=1e-4, atol=1e-4 * wanted.std().item()
    )


def build_like(moe: MoE, dtype: torch.dtype) -> MoE:
    """The same weights, rounded."""
    bias = moe.router_bias is not None
    count, hidden, inner = moe.down.shape
    config = ModelConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        moe=MoEConfig(count, moe.experts_per_token, moe.renormalise, bias),
        activation=Activation(moe.activation),
    )
    copied = MoE(config, dtype=dtype, device="cpu")
    copied.load_state_dict(moe.state_dict())
    return copied


@pytest.mark.parametrize("path", ["grouped_mm", "dense"])
@pytest.mark.parametrize("chosen", [(0, 1, 2), (5, 6, 7), (3, 0, 7)])
def test_experts_with_all_tokens_and_with_none(
    pair: tuple[torch.nn.Module, MoE], chosen: tuple[int, ...], path: str
) -> None:
    _, exact = pair
    ours, x_TE = build_like(exact, torch.float32), inputs(33, torch.float32).abs()
    ours.router.zero_()
    ours.router[list(chosen)] = 1.0
    for n in set(range(8)) - set(chosen):
        ours.gate_up[n] = ours.down[n] = float("inf")  # not theirs to read
    ours.router += torch.linspace(0, 1e-3, 8)[:, None]
    assert with_path(ours, x_TE, path).isfinite().all()


def test_sizes_that_grouped_mm_refuses_are_computed_all_the_same() -> None:
    config = ModelConfig(hidden_size=6, intermediate_size=10, moe=MoEConfig(4, 2))
    moe = MoE(config, dtype=torch.float32, device="cpu")
    for parameter in moe.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(1))
    x_TE = torch.randn(7, 6, generator=torch.Generator().manual_seed(2))
    assert choose_path(x_TE, moe.gate_up, moe.down) == "dense"
    exact = build_like(moe, torch.float64)
    torch.testing.assert_close(moe(x_TE).double(), exact(x_TE.double()), rtol=1e-4, atol=1e-3)


def test_routing_is_in_float32_for_low_precision() -> None:
    logits = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights, experts = route(logits, 4, renormalise=True)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(50))
    chosen = logits.double().gather(1, experts)
    torch.testing.assert_close(weights.double(), chosen.softmax(-1), rtol=1e-5, atol=1e-6)
    assert bool((chosen.amin(1) >= logits.double().scatter(1, experts, -torch.inf).amax(1)).all())


def packed_tensors(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Random MXFP4 of [..., G, 16] bytes, with exponents around one."""
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(117, 130, shape[:-1], dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_is_unpacked_as_transformers_does(dtype: torch.dtype) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = packed_tensors((3, 10, 4, 16))
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)  # which transposes
    ours = dequantise_mxfp4(blocks, scales, dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours.transpose(1, 2), theirs)


def test_an_mxfp4_checkpoint_equals_its_unpacked_twin() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    family, generator = FAMILIES["GptOss"], torch.Generator().manual_seed(4)
    experts = f"{PREFIX}mlp.experts."
    plain = {
        f"{PREFIX}mlp.router.weight": torch.randn(8, HIDDEN, generator=generator),
        f"{PREFIX}mlp.router.bias": torch.randn(8, generator=generator),
        f"{experts}gate_up_proj_bias": torch.randn(8, 2 * INNER, generator=generator),
        f"{experts}down_proj_bias": torch.randn(8, HIDDEN, generator=generator),
    }
    packed = dict(plain)
    for name, rows, columns in (("gate_up_proj", 2 * INNER, HIDDEN), ("down_proj", HIDDEN, INNER)):
        blocks, scales = packed_tensors((8, rows, columns // 32, 16))
        packed |= {f"{experts}{name}_blocks": blocks, f"{experts}{name}_scales": scales}
        plain[f"{experts}{name}"] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    models = []
    for tensors in (plain, packed):
        ours = build_ours(family, torch.bfloat16)
        used = fill(expert_targets("GptOssForCausalLM", ours, PREFIX, tensors.keys()), tensors)
        assert used == tensors.keys()
        models.append(ours)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert bool(one.isfinite().all())
        assert torch.equal(one, other)


def test_all_architectures_are_tested() -> None:
    assert {architecture_of(name) for name in FAMILIES} == set(ARCHITECTURES)
