"""Sampling in plain torch, for the CPU and for float64: the same tokens as the kernels of sampling.py, by sorting.

Shapes: B requests, X vocabulary. Random words are those of the kernels, bit for bit; what follows differs by rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LANES = 1024  # as in sampling.py: ids that share a Philox block lie this far apart
_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox 4x32-10: four words of 32 bits for a counter of four and a key of two; all int64, and broadcast."""
    (c0, c1, c2, c3), (k0, k1) = torch.broadcast_tensors(*counter), key
    for _ in range(_ROUNDS):
        # Products of 32 bits wrap around in int64 and keep their bits.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = k0 + _KEY_STEPS[0] & _WORD, k1 + _KEY_STEPS[1] & _WORD
    return c0, c1, c2, c3


def random_words(seed_B: Tensor, positions_B: Tensor, vocab: int) -> Tensor:
    """32 random bits for each (seed, position, id), as int64 [B, X]. Id ``4096 n + 1024 w + i`` has word w of the block
    with the counter (1024 n + i, 0, position, 0) and the seed as key."""
    ids_X = torch.arange(vocab, device=seed_B.device)
    block_X, lane_X = ids_X // (4 * _LANES) * _LANES + ids_X % _LANES, ids_X // _LANES % 4
    zero_X = torch.zeros_like(block_X)
    position_B1, seed_B1 = positions_B.long()[:, None] & _WORD, seed_B.long()[:, None]
    words = philox((block_X, zero_X, position_B1, zero_X), (seed_B1 & _WORD, seed_B1 >> 32 & _WORD))
    low, high = torch.where(lane_X == 0, words[0], words[1]), torch.where(lane_X == 2, words[2], words[3])
    return torch.where(lane_X < 2, low, high)


def exponential_noise(seed_B: Tensor, positions_B: Tensor, vocab: int) -> Tensor:
    """Standard exponential numbers, float32 [B, X]: ``-log(1 - v)`` of a uniform v."""
    uniform = (random_words(seed_B, positions_B, vocab).float() + 0.5) * 2.0**-32
    return -torch.log1p(-uniform.clamp(max=1 - 2.0**-24))


def kept(
    logits_BX: Tensor, temperature_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor
) -> Tensor:
    """Which ids may be drawn, bool [B, X], for finite logits or -inf."""
    vocab = logits_BX.shape[1]
    sorted_BX = logits_BX.sort(dim=-1, descending=True).values
    peak_B1 = sorted_BX[:, :1]
    temperature_B1, top_k_B1, top_p_B1, min_p_B1 = (
        t[:, None] for t in (temperature_B.to(logits_BX.dtype), top_k_B.long(), top_p_B.double(), min_p_B)
    )
    k_B1 = torch.where((top_k_B1 > 0) & (top_k_B1 < vocab), top_k_B1, vocab)
    threshold_B1 = sorted_BX.gather(1, k_B1 - 1)
    weights_BX = ((sorted_BX - peak_B1) / temperature_B1).double().exp()
    weights_BX = torch.where(sorted_BX >= threshold_B1, weights_BX, 0.0)
    mass_BX = weights_BX.cumsum(-1)
    before_BX = mass_BX - weights_BX
    nucleus_BX = (before_BX < top_p_B1 * mass_BX[:, -1:]) | (top_p_B1 >= 1)
    nucleus_BX[:, 0] = True
    lowest_B1 = torch.where(nucleus_BX, sorted_BX, float("inf")).amin(-1, keepdim=True)
    threshold_B1 = torch.maximum(threshold_B1, lowest_B1)
    floor_B1 = peak_B1 + min_p_B1.log().to(logits_BX.dtype) * temperature_B1
    return (logits_BX >= torch.maximum(threshold_B1, floor_B1)) & (logits_BX > float("-inf"))


def sample(
    logits_BX: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    seed_B: Tensor,
    positions_B: Tensor,
    out_B: Tensor,
) -> None:
    """One token for each row into ``out_B``; ops.sample says what the parameters do."""
    greedy_B = logits_BX.argmax(-1)
    if logits_BX.dtype != torch.float64:
        logits_BX = logits_BX.float()
    highest = torch.finfo(torch.float32).max
    logits_BX = logits_BX.nan_to_num(float("-inf"), highest, float("-inf"))
    sampled_B = temperature_B > 0
    temperature_B = torch.where(sampled_B, temperature_B, 1.0).to(logits_BX.dtype)
    kept_BX = kept(logits_BX, temperature_B, top_k_B, top_p_B, min_p_B)
    peak_B1 = logits_BX.amax(-1, keepdim=True).clamp(min=-highest)
    weights_BX = ((logits_BX - peak_B1) / temperature_B[:, None]).double().exp()
    arrivals_BX = exponential_noise(seed_B, positions_B, logits_BX.shape[1]) / weights_BX
    drawn_B = torch.where(kept_BX, arrivals_BX, float("inf")).argmin(-1)
    out_B.copy_(torch.where(sampled_B, drawn_B, greedy_B))
