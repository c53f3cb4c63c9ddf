"""Draws of the sampling kernels and their torch twin: against the exact distribution, Philox against its authors'
vectors, and the two against one another; the sets they draw from are in test_sampling_kept.py.

Shapes: B requests, X vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fa_research.kernels import ops, sampling, sampling_torch
from tests.kernels.sampling_oracle import DEVICE, FILTERS, SAMPLED, Params, defined, logits_of, packed

pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning"
)  # of the interpreter, at -inf
VOCABULARIES = [1, 256, 5000] if DEVICE == "cpu" else [1, 256, 50257, 128256, 151936, 262144]
DRAWS = 20_000


def words(*values: int) -> list[Tensor]:
    return [torch.tensor([value]) for value in values]


def test_philox_has_the_known_answers_of_random123() -> None:
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    for *counter_key, expected in (
        (0, 0, 0, 0, 0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (*[ones] * 6, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (*pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        inputs = words(*counter_key)
        found = sampling_torch.philox(tuple(inputs[:4]), tuple(inputs[4:]))
        assert [int(word) for word in found] == list(expected)
    drawn = sampling_torch.random_words(torch.tensor([0]), torch.tensor([0]), 4096)[0, ::1024]
    assert drawn.tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def draw(
    logits_BX: Tensor,
    params: list[Params],
    seeds: Tensor,
    positions: Tensor,
    *,
    kernel: bool = False,
    **options: int,
) -> Tensor:
    out_B = torch.full((len(params),), -1, dtype=torch.int64, device=logits_BX.device)
    device = str(logits_BX.device)
    run = sampling.sample if kernel else ops.sample
    run(logits_BX, *packed(params, device), seeds.to(device), positions.to(device), out_B, **options)
    return out_B


def exact(x_X: Tensor, params: Params) -> Tensor:
    return torch.where(defined(x_X, params), x_X.double().cpu() / params.temperature, float("-inf")).softmax(
        0
    )


def assert_drawn_from(drawn: Tensor, probabilities: Tensor) -> None:
    """Nothing impossible; chi-square within 5 standard deviations, ids expected fewer than 5 times taken together."""
    counts = torch.bincount(drawn.cpu(), minlength=len(probabilities)).double()
    expected = probabilities * counts.sum()
    assert counts[probabilities == 0].sum() == 0
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = max(1, len(counts) - 1)
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5, (chi_square, freedom)
    distance = (counts - expected).abs().sum().item() / counts.sum().item() / 2
    assert distance < 2 * (len(counts) / counts.sum().item()) ** 0.5


@pytest.mark.parametrize("params", SAMPLED, ids=str)
def test_draws_have_the_exact_distribution(params: Params) -> None:
    """Over positions with one seed, and over seeds at one position."""
    x_X = torch.randn(50, generator=torch.Generator().manual_seed(3)) * 1.5
    probabilities = exact(x_X, params)
    logits_BX = x_X.to(DEVICE).expand(DRAWS, -1).contiguous()
    seeds, positions = torch.full((DRAWS,), 7), torch.arange(DRAWS, dtype=torch.int32)
    assert_drawn_from(draw(logits_BX, [params] * DRAWS, seeds, positions), probabilities)
    assert_drawn_from(
        draw(logits_BX, [params] * DRAWS, torch.arange(DRAWS) + 2**40, torch.full((DRAWS,), 99)),
        probabilities,
    )


def test_draws_of_one_after_another_are_independent() -> None:
    """Pairs of tokens at neighbouring positions, and of neighbouring seeds, have the product distribution."""
    x_X = torch.tensor([0.3, -0.5, 1.0, 0.0])
    p_X = x_X.double().softmax(0)
    pairs = torch.outer(p_X, p_X).flatten()
    logits_BX = x_X.to(DEVICE).expand(DRAWS, -1).contiguous()
    same, counting = torch.full((DRAWS,), 5), torch.arange(DRAWS)
    for seeds, positions in ((same, counting), (counting, same)):
        tokens = draw(logits_BX, [Params()] * DRAWS, seeds, positions)
        assert_drawn_from(tokens[0::2] * 4 + tokens[1::2], pairs)


def test_draws_over_ids_of_every_word_have_the_exact_distribution() -> None:
    """Ids 1024 apart share a Philox block, ids 4096 apart do not."""
    ids = torch.tensor([0, 1, 1023, 1024, 2049, 3073, 4096, 4097])
    weights = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 1.0, 2.0])
    x_X = torch.full((4100,), float("-inf"))
    x_X[ids] = weights.log()
    drawn = []
    for positions in torch.arange(2000).split(500):
        logits_BX = x_X.to(DEVICE).expand(len(positions), -1).contiguous()
        drawn.append(draw(logits_BX, [Params()] * len(positions), torch.zeros_like(positions), positions))
    assert_drawn_from(torch.cat(drawn), x_X.double().softmax(0))


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("kind", ["flat", "peaked", "wide"])
def test_kernel_and_torch_draw_the_same_tokens(kind: str, vocab: int) -> None:
    logits_BX = logits_of(kind, len(FILTERS), vocab)
    seeds = torch.arange(len(FILTERS)) * 2**50 - 3
    positions = torch.arange(len(FILTERS), dtype=torch.int32) * 1000
    by_torch = draw(logits_BX.cpu(), FILTERS, seeds, positions)
    by_kernel = draw(logits_BX, FILTERS, seeds, positions, kernel=True)
    assert by_kernel.tolist() == by_torch.tolist()
    assert vocab < 1000 or len(set(by_torch.tolist())) > 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["flat", "peaked", "ties", "equal", "masked"])
def test_many_rows_of_a_large_vocabulary(kind: str, dtype: torch.dtype) -> None:
    """64 rows at Llama 3's vocabulary: the kernel keeps what torch keeps on the same values, and draws the same."""
    params = [FILTERS[i % len(FILTERS)] for i in range(64)]
    logits_BX = logits_of(kind, 64, 128256, dtype)
    seeds, positions = torch.arange(64), torch.arange(64, dtype=torch.int32)
    by_torch = draw(logits_BX.float().cpu(), params, seeds, positions)
    assert draw(logits_BX, params, seeds, positions, kernel=True).tolist() == by_torch.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_token_is_the_same_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    logits_BX = logits_of("flat", len(FILTERS), 3000, dtype)
    seeds, positions = torch.arange(len(FILTERS)) + 11, torch.arange(len(FILTERS)) + 5
    together = draw(logits_BX, FILTERS, seeds, positions)
    order = torch.randperm(len(FILTERS), generator=torch.Generator().manual_seed(0))
    shuffled = draw(logits_BX[order.to(DEVICE)], [FILTERS[i] for i in order], seeds[order], positions[order])
    assert shuffled.tolist() == together[order.to(DEVICE)].tolist()
    for i, params in enumerate(FILTERS):
        alone = draw(logits_BX[i : i + 1], [params], seeds[i : i + 1], positions[i : i + 1])
        assert alone.tolist() == together[i : i + 1].tolist()


STRANGE = {
    "nan": [float("nan")] * 5000,
    "-inf": [float("-inf")] * 5000,
    "nan and -inf": [float("nan"), float("-inf")] * 2500,
}


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("params", [Params(), Params(0.8, 50, 0.9, 0.1), Params(0.0)], ids=str)
def test_rows_without_a_number_give_a_valid_token(params: Params, kernel: bool) -> None:
    logits_BX = torch.tensor(list(STRANGE.values()), device=DEVICE)
    tokens = draw(logits_BX, [params] * 3, torch.arange(3), torch.arange(3), kernel=kernel)
    assert tokens.tolist() == [0, 0, 0]


@pytest.mark.parametrize("options", [{}, {"kernel": True}, {"kernel": True, "capacity": 16}], ids=str)
@pytest.mark.parametrize("params", [Params(), Params(1.0, 3, 0.9, 0.1), Params(top_p=0.5)], ids=str)
def test_nan_and_minus_infinity_are_never_drawn_and_infinity_always_is(
    params: Params, options: dict[str, Any]
) -> None:
    x = torch.full((3, 4200), float("nan"), device=DEVICE)
    x[:, ::2] = float("-inf")
    x[0, 4101] = -3.0
    x[1, [7, 4099]] = torch.tensor([1.0, 1.5], device=DEVICE)
    x[2, [5, 9, 4100]] = torch.tensor([1e30, float("inf"), 3e38], device=DEVICE)
    tokens = draw(x, [params] * 3, torch.arange(3), torch.arange(3), **options).tolist()
    assert tokens[0] == 4101 and tokens[1] in (7, 4099) and tokens[2] == 9


@pytest.mark.parametrize("vocab", [*VOCABULARIES, 4096, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_argmax_is_torchs(vocab: int, dtype: torch.dtype) -> None:
    """Ties, signed zeros, NaN, infinities; rows that are strided."""
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter's bfloat16 is not the GPU's")
    wide = torch.randn(7, vocab + 16, device=DEVICE).mul(3).round().to(dtype)
    x = wide[:, 16:]
    x[1] = 0.0
    x[1, vocab // 3 :: 2] = -0.0
    x[2, vocab // 2 :] = float("nan")
    x[3] = float("-inf")
    x[4, -1] = float("inf")
    x[4, vocab // 2] = float("nan") if vocab > 2 else x[4, vocab // 2]
    x[5] = -7.0
    expected = torch.argmax(x, dim=-1)
    assert sampling.argmax(x).tolist() == expected.tolist()
    out_B = torch.full((7,), -1, dtype=torch.int64, device=DEVICE)
    assert ops.argmax(x, out=out_B) is out_B
    assert out_B.tolist() == expected.tolist()


def test_float64_is_drawn_by_torch_on_every_device() -> None:
    logits_BX = logits_of("flat", len(FILTERS), 300, torch.float64)
    seeds, positions = torch.arange(len(FILTERS)), torch.arange(len(FILTERS))
    expected = draw(logits_BX.float().cpu(), FILTERS, seeds, positions)
    assert draw(logits_BX, FILTERS, seeds, positions).tolist() == expected.tolist()
    assert torch.equal(ops.argmax(logits_BX), logits_BX.argmax(-1))


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [256, 50257, 128256])
def test_a_captured_draw_follows_its_static_parameters(vocab: int) -> None:
    """One graph serves greedy and sampled requests, whatever the tensors hold at its replay."""
    size = len(FILTERS)
    logits_BX = torch.zeros(size, vocab, dtype=torch.bfloat16, device=DEVICE)
    static = [*packed([Params(0.0)] * size), torch.zeros(size, dtype=torch.int64, device=DEVICE)]
    positions, out_B = (torch.zeros(size, dtype=dtype, device=DEVICE) for dtype in (torch.int32, torch.int64))
    ops.sample(logits_BX, *static, positions, out_B)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.sample(logits_BX, *static, positions, out_B)
    for turn, kind in enumerate(["flat", "peaked", "ties"]):
        logits_BX.copy_(logits_of(kind, size, vocab))
        turned = FILTERS[turn:] + FILTERS[:turn]
        for tensor, value in zip(static, [*packed(turned), torch.arange(size) + turn], strict=True):
            tensor.copy_(value)
        positions.fill_(turn + 100)
        graph.replay()
        expected = draw(logits_BX, turned, torch.arange(size) + turn, torch.full((size,), turn + 100))
        assert out_B.tolist() == expected.tolist()
