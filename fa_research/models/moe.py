"""A mixture of experts in the place of the MLP: a router chooses a few of many gated MLPs for each token.

Legend: T tokens, N experts, J experts of a token, P = T * J pairs of a token and an expert, E hidden size, F
intermediate size of one expert.

Three ways through the experts, chosen by device, dtype and shape alone:

| path | what it does | for |
|---|---|---|
| `triton` | our kernels (`kernels/moe.py`), which gather tokens as they go | CUDA, up to float32 |
| `grouped_mm` | pairs sorted by expert, two grouped products of torch's | the CPU, up to float32 |
| `dense` | every expert on every token, most results dropped | what is left: float64, odd sizes |

None reads a device value on the host, and shapes depend on T alone, so that a CUDA graph may hold each of them. Idea:
Shazeer et al., "Outrageously Large Neural Networks" (2017); Fedus et al., "Switch Transformers" (2021).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa_research.config import ModelConfig
from fa_research.kernels import ops

PATHS = ("triton", "grouped_mm", "dense")
_KERNEL_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
_ALIGNMENT = 16  # bytes, of every row of what grouped_mm takes


class MoE(nn.Module):
    """The weights of one layer's experts, uninitialised, and their forward pass.

    Attributes:
        router: [N, E]; router_bias: [N] or None.
        gate_up: [N, 2F, E], rows: all of gate, then up; gate_up_bias: [N, 2F] or None.
        down: [N, E, F]; down_bias: [N, E] or None.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.experts_per_token = config.moe.experts_per_token
        self.renormalise = config.moe.norm_topk_prob
        self.activation = config.activation.value
        count, hidden, inner = config.moe.num_experts, config.hidden_size, config.intermediate_size

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.router = weight(count, hidden)
        self.gate_up = weight(count, 2 * inner, hidden)
        self.down = weight(count, hidden, inner)
        self.router_bias = weight(count) if config.moe.bias else None
        self.gate_up_bias = weight(count, 2 * inner) if config.moe.bias else None
        self.down_bias = weight(count, hidden) if config.moe.bias else None

    def forward(self, x_TE: Tensor) -> Tensor:
        """[T, E] -> [T, E]."""
        return self.experts(x_TE, F.linear(x_TE, self.router, self.router_bias))

    def experts(self, x_TE: Tensor, logits_TN: Tensor, path: str | None = None) -> Tensor:
        """The output [T, E] for the router's logits; `path` insists on one of `PATHS`, whether it can or not."""
        path = path or choose_path(x_TE, self.gate_up, self.down)
        if path == "triton":
            return self._triton(x_TE, logits_TN)
        weights_TJ, experts_TJ = route(logits_TN, self.experts_per_token, self.renormalise)
        if path == "grouped_mm":
            return self._grouped(x_TE, weights_TJ, experts_TJ)
        return self._dense(x_TE, weights_TJ, experts_TJ)

    def _triton(self, x_TE: Tensor, logits_TN: Tensor) -> Tensor:
        from fa_research.kernels.moe import moe

        return moe(
            x_TE, logits_TN, self.gate_up, self.gate_up_bias, self.down, self.down_bias, activation=self.activation,
            experts_per_token=self.experts_per_token, renormalise=self.renormalise,
        )  # fmt: skip

    def _grouped(self, x_TE: Tensor, weights_TJ: Tensor, experts_TJ: Tensor) -> Tensor:
        """Pairs sorted by expert: each expert is one product of its tokens in a grouped product."""
        sorted_P, order_P = experts_TJ.flatten().sort(stable=True)
        numbers_N = torch.arange(len(self.router), device=x_TE.device, dtype=sorted_P.dtype)
        ends_N = torch.searchsorted(sorted_P, numbers_N, right=True, out_int32=True)
        x_PE = x_TE[order_P // self.experts_per_token]
        gate_up_P2F = F.grouped_mm(x_PE, self.gate_up.transpose(1, 2), offs=ends_N)
        if self.gate_up_bias is not None:
            gate_up_P2F += self.gate_up_bias[sorted_P]
        inner_PF = ops.glu(gate_up_P2F, self.activation)
        out_PE = F.grouped_mm(inner_PF, self.down.transpose(1, 2), offs=ends_N)
        if self.down_bias is not None:
            out_PE += self.down_bias[sorted_P]
        pairs_PE = torch.empty_like(out_PE)
        pairs_PE[order_P] = out_PE
        return _weighted_sum(pairs_PE.unflatten(0, weights_TJ.shape), weights_TJ).to(x_TE.dtype)

    def _dense(self, x_TE: Tensor, weights_TJ: Tensor, experts_TJ: Tensor) -> Tensor:
        """N / J times the work that is needed, but in any dtype, and with one expert's results in memory at a time."""
        weights_TN = weights_TJ.new_zeros(len(x_TE), len(self.router)).scatter_(1, experts_TJ, weights_TJ)
        chosen_TN = torch.zeros_like(weights_TN, dtype=torch.bool).scatter_(1, experts_TJ, True)
        total_TE = torch.zeros_like(x_TE, dtype=weights_TJ.dtype)
        for n in range(len(self.router)):
            gate_up_bias = None if self.gate_up_bias is None else self.gate_up_bias[n]
            down_bias = None if self.down_bias is None else self.down_bias[n]
            inner_TF = ops.glu(F.linear(x_TE, self.gate_up[n], gate_up_bias), self.activation)
            out_TE = F.linear(inner_TF, self.down[n], down_bias) * weights_TN[:, n, None]
            total_TE += out_TE.masked_fill(~chosen_TN[:, n, None], 0.0)  # not 0 times it: it may be infinite
        return total_TE.to(x_TE.dtype)


def choose_path(x_TE: Tensor, gate_up_N2FE: Tensor, down_NEF: Tensor) -> str:
    """The way through the experts for this input."""
    if x_TE.is_cuda and x_TE.dtype in _KERNEL_DTYPES:
        return "triton"
    return "grouped_mm" if _can_group(x_TE, gate_up_N2FE, down_NEF) else "dense"


def _can_group(x_TE: Tensor, *weights: Tensor) -> bool:
    """Whether torch's grouped_mm takes these without waiting for the device: on CUDA it has a kernel for bf16 from
    Hopper on, and for the rest a loop over offsets that it reads on the host."""
    if x_TE.is_cuda:
        hopper = torch.version.hip is None and torch.cuda.get_device_capability(x_TE.device) >= (9, 0)
        served = hopper and x_TE.dtype == torch.bfloat16
    else:
        served = x_TE.dtype in _KERNEL_DTYPES
    return served and all(w.shape[-1] * w.element_size() % _ALIGNMENT == 0 for w in weights)


def route(logits_TN: Tensor, experts_per_token: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """(weights, experts), both [T, J]: the likeliest experts by a softmax over all, at least in float32. With
    `renormalise` the weights of a token sum to 1, which is the softmax over the chosen alone."""
    dtype = torch.promote_types(logits_TN.dtype, torch.float32)
    weights_TJ, experts_TJ = logits_TN.softmax(-1, dtype=dtype).topk(experts_per_token, dim=-1)
    if renormalise:
        weights_TJ = weights_TJ / weights_TJ.sum(-1, keepdim=True)
    return weights_TJ, experts_TJ


def _weighted_sum(pairs_TJE: Tensor, weights_TJ: Tensor) -> Tensor:
    return (pairs_TJE.to(weights_TJ.dtype) * weights_TJ[..., None]).sum(1)
