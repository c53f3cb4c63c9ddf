"""The kernels of a mixture of experts against the same experts in float64: any routing, in the interpreter and on the
GPU, there also inside a CUDA graph whose routing changes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fa_research.config import Activation, ModelConfig, MoEConfig
from fa_research.kernels.moe import Tiles, choose_tiles, max_blocks, moe
from fa_research.kernels.moe_routing import combine, route
from fa_research.measure.numerics import judge_rows
from fa_research.models.moe import MoE, choose_path
from fa_research.models.moe import route as plain_route

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32] + ([torch.float16, torch.bfloat16] if DEVICE == "cuda" else [])
SMALL = Tiles(16, 32, 32, 4, 2)
SWAPPED = Tiles(16, 64, 64, 4, 3, swap=True)


def build(
    hidden: int,
    inner: int,
    options: MoEConfig,
    activation: Activation = Activation.silu,
    dtype: torch.dtype = torch.float32,
) -> MoE:
    config = ModelConfig(hidden_size=hidden, intermediate_size=inner, moe=options, activation=activation)
    layer = MoE(config, dtype=dtype, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for weight in layer.parameters():
        weight.normal_(std=weight.shape[-1] ** -0.5 if weight.dim() == 3 else 1.0, generator=generator)
    return layer


def inputs(layer: MoE, tokens: int) -> tuple[Tensor, Tensor]:
    """Tokens, and logits without ties, so that every way of choosing chooses the same."""
    generator = torch.Generator(DEVICE).manual_seed(tokens)
    count, hidden = layer.router.shape
    x_TE = torch.randn(tokens, hidden, generator=generator, device=DEVICE).to(layer.router.dtype)
    steps = torch.rand(tokens, count, generator=generator, device=DEVICE).argsort(1)
    return x_TE, (steps / 8 - 2).to(layer.router.dtype)


def run(layer: MoE, x_TE: Tensor, logits_TN: Tensor, tiles: Tiles | None) -> Tensor:
    return moe(
        x_TE, logits_TN, layer.gate_up, layer.gate_up_bias, layer.down, layer.down_bias, activation=layer.activation,
        experts_per_token=layer.experts_per_token, renormalise=layer.renormalise, tiles=tiles and (tiles, tiles),
    )  # fmt: skip


def assert_right(layer: MoE, x_TE: Tensor, logits_TN: Tensor, result: Tensor) -> None:
    baseline = layer.experts(x_TE, logits_TN, "dense")
    exact = copy.deepcopy(layer).double()
    reference = exact.experts(x_TE.double(), logits_TN.double(), "dense")
    verdict = judge_rows([(result, baseline, reference)])
    assert verdict.passed, verdict


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tiles", [SMALL, SWAPPED, None], ids=["small", "swapped", "chosen"])
@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "options", "activation"),
    [
        (1, 64, 32, MoEConfig(8, 2), Activation.silu),
        (7, 64, 96, MoEConfig(8, 2, norm_topk_prob=False), Activation.silu),
        (21, 72, 40, MoEConfig(5, 3, bias=True), Activation.swiglu_clamped),  # divides by no block size
        (9, 32, 48, MoEConfig(4, 4), Activation.gelu_tanh),  # all experts for every token
    ],
)
def test_kernels_against_float64(
    tokens: int,
    hidden: int,
    inner: int,
    options: MoEConfig,
    activation: Activation,
    tiles: Tiles | None,
    dtype: torch.dtype,
) -> None:
    layer = build(hidden, inner, options, activation, dtype)
    x_TE, logits_TN = inputs(layer, tokens)
    assert_right(layer, x_TE, logits_TN, run(layer, x_TE, logits_TN, tiles))


@pytest.mark.parametrize("favourites", [(0, 1), (6, 7), (2, 5)])
def test_two_experts_have_all_tokens(favourites: tuple[int, int]) -> None:
    layer = build(32, 32, MoEConfig(8, 2))
    x_TE, logits_TN = inputs(layer, 37)
    logits_TN[:, list(favourites)] += 100.0
    for n in set(range(8)) - set(favourites):
        layer.gate_up[n] = layer.down[n] = float("nan")  # not to be read
    result = run(layer, x_TE, logits_TN, SMALL)
    for weight in layer.parameters():
        weight.nan_to_num_(0.0)
    assert_right(layer, x_TE, logits_TN, result)


@pytest.mark.parametrize(
    ("tokens", "experts", "chosen", "renormalise"),
    [(1, 128, 8, False), (1, 6, 1, True), (50, 5, 3, False), (50, 5, 3, True), (1030, 3, 1, False)],
)
def test_routing(tokens: int, experts: int, chosen: int, renormalise: bool) -> None:
    logits = torch.randn(
        tokens, experts, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE
    )  # no ties
    weights, counts, pairs = route(logits, chosen, renormalise)
    wanted_weights, wanted = plain_route(logits, chosen, renormalise)
    torch.testing.assert_close(weights, wanted_weights, rtol=1e-5, atol=1e-7)
    for expert in range(experts):
        listed = pairs[expert, : counts[expert]].sort().values
        assert torch.equal(listed.long(), (wanted.flatten() == expert).nonzero()[:, 0])


def test_logits_that_are_no_numbers_choose_experts_that_exist() -> None:
    logits = torch.full((3, 5), float("nan"), device=DEVICE)
    logits[1] = float("-inf")
    logits[2, 1:] = float("-inf")
    _, counts, pairs = route(logits, 4, renormalise=True)
    assert counts.sum() == 12 and counts.max() <= 3
    listed = torch.cat([pairs[n, : counts[n]] for n in range(5)])
    assert torch.equal(listed.sort().values, torch.arange(12, device=DEVICE, dtype=torch.int32))


def test_weighted_sum() -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    pairs = torch.randn(3 * 4, 700, generator=generator, device=DEVICE)
    weights = torch.rand(3, 4, generator=generator, device=DEVICE)
    wanted = torch.einsum("tje,tj->te", pairs.view(3, 4, -1).double(), weights.double())
    torch.testing.assert_close(combine(pairs, weights, False).double(), wanted, rtol=1e-5, atol=1e-5)


def test_no_routing_needs_more_blocks_than_the_grid_has() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        tokens, experts, block_m = (
            int(torch.randint(1, high, (), generator=generator)) for high in (60, 20, 33)
        )
        chosen = int(torch.randint(1, experts + 1, (), generator=generator))
        skew = torch.rand(experts, generator=generator) * 6
        logits = torch.randn(tokens, experts, generator=generator) + skew
        counts = logits.topk(chosen).indices.flatten().bincount(minlength=experts)
        needed = int((-(-counts // block_m)).sum())
        assert needed <= max_blocks(tokens * chosen, experts, block_m)
    assert max_blocks(1, 128, 16) == 1
    assert max_blocks(8, 128, 16) == 8  # eight experts with a token each


@pytest.mark.parametrize("hopper", [False, True])
def test_more_tokens_an_expert_take_larger_blocks(hopper: bool) -> None:
    sizes = [
        choose_tiles(tokens * 8, 128, 768, True, 2, hopper).block_m for tokens in (1, 64, 256, 1024, 4096)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] == 16 and sizes[-1] == 128


def test_wide_tiles_do_not_cost_a_second_wave() -> None:
    def width(pairs: int, experts: int, inner: int) -> int:
        return choose_tiles(pairs, experts, inner, True, 2, True).block_k

    assert width(2, 8, 14336) == 64  # 448 programs: four a multiprocessor hold them, two do not
    assert width(8, 128, 768) == 128  # 96 programs: all at once either way
    assert width(32, 8, 14336) == 128  # 2016 programs: many waves either way


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 64, 300, 4096])
@pytest.mark.parametrize(
    ("hidden", "inner", "options", "activation"),
    [
        (2048, 768, MoEConfig(128, 8), Activation.silu),
        (2880, 2880, MoEConfig(32, 4, bias=True), Activation.swiglu_clamped),
        (4096, 14336, MoEConfig(8, 2), Activation.silu),
    ],
    ids=["qwen3_30b_a3b", "gpt_oss_20b", "mixtral_8x7b"],
)
def test_large_layers_on_the_gpu(
    hidden: int, inner: int, options: MoEConfig, activation: Activation, tokens: int
) -> None:
    layer = build(hidden, inner, options, activation, torch.bfloat16)
    x_TE, logits_TN = inputs(layer, tokens)
    assert choose_path(x_TE, layer.gate_up, layer.down) == "triton"
    result = layer.experts(x_TE, logits_TN)
    grouped = layer.experts(x_TE, logits_TN, "grouped_mm")
    rows = torch.linspace(0, tokens - 1, min(tokens, 24)).long()
    assert_right(layer, x_TE[rows], logits_TN[rows], result[rows])
    assert_right(layer, x_TE[rows], logits_TN[rows], grouped[rows])


def captured(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["triton", "grouped_mm", "dense"])
def test_a_cuda_graph_follows_the_routing(path: str) -> None:
    layer = build(256, 192, MoEConfig(16, 4, bias=True), Activation.swiglu_clamped, torch.bfloat16)
    x_TE, logits_TN = inputs(layer, 48)
    graph, out_TE = captured(lambda: layer.experts(x_TE, logits_TN, path))
    for change in range(6):
        x_TE.copy_(torch.randn_like(x_TE))
        logits_TN.copy_(logits_TN[:, torch.randperm(16, device=DEVICE)])
        if change == 4:
            logits_TN[:, :4] += 50  # four experts for all
        graph.replay()
        assert_right(layer, x_TE, logits_TN, out_TE)


@pytest.mark.gpu
def test_a_token_gets_the_same_bits_alone_in_any_place() -> None:
    # Places within an expert are claimed in whatever order programs come; results must not show it.
    layer = build(512, 256, MoEConfig(16, 4), dtype=torch.bfloat16)
    x_TE, logits_TN = inputs(layer, 64)
    first = layer.experts(x_TE, logits_TN)
    order = torch.randperm(64, device=DEVICE)
    assert torch.equal(layer.experts(x_TE[order], logits_TN[order]), first[order])


COMPILE = r"""
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fa_research.kernels import moe, moe_routing

def compiled(kernel, constants, dtype="bf16", warps=4, stages=3, arch=90, **kinds):
    names = kernel.arg_names
    types = {name: "*" + dtype if name.endswith("_ptr") else "i32" for name in names} | kinds
    signature = types | dict.fromkeys(constants, "constexpr")
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in names if signature[name][0] == "*"}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": warps, "num_stages": stages}
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    most = {89: 99, 90: 227}[arch]  # KiB of shared memory that a program may have
    assert done.metadata.shared <= most << 10, (arch, constants, done.metadata.shared)
    return done.asm["ptx"]

def experts(tokens, count, chosen, hidden, inner, gated, dtype="bf16", swap=None, arch=90, **more):
    cut = moe.choose_tiles(tokens * chosen, count, inner, gated, 4 if dtype == "fp32" else 2, arch == 90)
    k, width = (hidden, inner) if gated else (inner, hidden)
    shape = {"N": count, "BLOCK_E": triton.next_power_of_2(count), "PAIRS_PER_ROW": chosen if gated else 1, "K": k,
             "WIDTH": width, "GATED": gated, "ACTIVATION": "silu", "BLOCK_M": cut.block_m, "BLOCK_N": cut.block_n,
             "BLOCK_K": cut.block_k, "SWAP": cut.swap if swap is None else swap, "OVERLAP": arch == 90} | more
    ints = {"counts_ptr": "*i32", "pairs_ptr": "*i32"}
    return compiled(moe._experts_kernel, shape, dtype, cut.num_warps, cut.num_stages, arch, **ints)

def copies(ptx):
    return set(re.findall(r"cp\.async\.c\w\.shared\.global.*?, (0x\w+)[,;]", ptx.replace("\n", " ")))

for shape in ((128, 8, 2048, 768), (8, 2, 4096, 14336)):
    for gated in (True, False):
        for tokens in (1, 4096):
            ptx = experts(tokens, *shape, gated, bias_ptr=None)
            assert copies(ptx) == {"0x10"}
        assert "wgmma.mma_async" in ptx
assert copies(experts(64, 32, 4, 2880, 2880, True, ACTIVATION="swiglu_clamped")) == {"0x10"}
assert "wgmma.mma_async" in experts(64, 32, 4, 2880, 2880, True, swap=True, bias_ptr=None)
for tokens, gated in ((64, True), (4096, True), (4096, False)):
    experts(tokens, 128, 8, 2048, 768, gated, arch=89, bias_ptr=None)
assert "tf32" not in experts(64, 8, 2, 256, 192, True, dtype="fp32", ACTIVATION="gelu_tanh")
routing = {"N": 128, "BLOCK_E": 128, "J": 8, "BLOCK_J": 8, "RENORMALISE": True, "BLOCK_T": 1}
compiled(moe_routing._route_kernel, routing, warps=1, weights_ptr="*fp32", counts_ptr="*i32", pairs_ptr="*i32")
compiled(moe_routing._combine_kernel, {"E": 2048, "J": 8, "BLOCK": 512, "OVERLAP": True}, weights_ptr="*fp32")
print("compiled")
"""


def test_kernels_compile_and_fit_the_shared_memory() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout.strip() == "compiled", done.stderr[-3000:]
