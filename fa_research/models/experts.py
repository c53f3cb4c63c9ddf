"""Which tensors of a checkpoint make a mixture of experts, as transformers saves them and as gpt-oss is published.

Legend: N experts, E hidden size, F intermediate size of one expert.

| architecture | experts |
|---|---|
| Mixtral | `block_sparse_moe.experts.{n}.w1` (gate), `w3` (up), `w2` (down): a matrix each |
| Qwen3-MoE | `mlp.experts.{n}.gate_proj`, `up_proj`, `down_proj`: a matrix each |
| gpt-oss | all experts in one, transposed, gate and up of a neuron side by side; published in MXFP4 |

MXFP4 (Open Compute Project, "Microscaling Formats (MX) Specification", 2023): 32 values in a row share a power of two;
each is 4 bits, E2M1, two to a byte, the low half first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fa_research.models.moe import MoE

# What safetensors calls the dtypes that a tensor may be stored in.
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
BYTES = frozenset({"U8"})

_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_SCALE_BIAS = 127
_MATRICES = {
    "MixtralForCausalLM": ("block_sparse_moe", "w1", "w3", "w2"),
    "Qwen3MoeForCausalLM": ("mlp", "gate_proj", "up_proj", "down_proj"),
}
_PACKED = "GptOssForCausalLM"
ARCHITECTURES = (*_MATRICES, _PACKED)


@dataclass(frozen=True, slots=True)
class Target:
    """Where tensors of a checkpoint go.

    destination: a parameter, or a view of one.
    sources: name -> shape as stored.
    dtypes: what they may be stored as.
    transform: of the sources, in their order, to one tensor of the destination's shape; None: as it is.
    """

    destination: Tensor
    sources: dict[str, tuple[int, ...]]
    dtypes: frozenset[str] = FLOATS
    transform: Callable[..., Tensor] | None = None

    def write(self, *stored: Tensor) -> None:
        """Convert the sources, given in their order, into the destination."""
        assert len(stored) == len(self.sources)
        value = stored[0] if self.transform is None else self.transform(*stored)
        self.destination.copy_(value)


def expert_targets(
    architecture: str, moe: MoE, prefix: str, stored: Collection[str] = ()
) -> dict[str, Target]:
    """First source -> target, for all tensors of one mixture of experts, the router among them. `prefix` is put before
    every name ("model.layers.3."); `stored` are the names in the checkpoint, which decide between bf16 and MXFP4.

    Raises KeyError for an architecture that is not in `ARCHITECTURES`.
    """
    targets = (
        _packed(moe, prefix, stored) if architecture == _PACKED else _matrices(architecture, moe, prefix)
    )
    return {next(iter(target.sources)): target for target in targets}


def _as_it_is(name: str, destination: Tensor) -> Target:
    return Target(destination, {name: tuple(destination.shape)})


def _matrices(architecture: str, moe: MoE, prefix: str) -> list[Target]:
    block, gate_name, up_name, down_name = _MATRICES[architecture]
    targets = [_as_it_is(f"{prefix}{block}.gate.weight", moe.router)]
    for n, (gate_up, down) in enumerate(zip(moe.gate_up.unbind(), moe.down.unbind(), strict=True)):
        gate, up = gate_up.chunk(2)
        for name, destination in ((gate_name, gate), (up_name, up), (down_name, down)):
            targets.append(_as_it_is(f"{prefix}{block}.experts.{n}.{name}.weight", destination))
    return targets


def _packed(moe: MoE, prefix: str, stored: Collection[str]) -> list[Target]:
    assert moe.router_bias is not None and moe.gate_up_bias is not None and moe.down_bias is not None
    experts = f"{prefix}mlp.experts."
    gate_up_NF2E = moe.gate_up.unflatten(1, (2, -1)).transpose(1, 2)  # stored with gate and up side by side
    gate_up_bias_NF2 = moe.gate_up_bias.unflatten(1, (2, -1)).transpose(1, 2)
    targets = [
        _as_it_is(f"{prefix}mlp.router.weight", moe.router),
        _as_it_is(f"{prefix}mlp.router.bias", moe.router_bias),
        _side_by_side(f"{experts}gate_up_proj_bias", gate_up_bias_NF2),
        _as_it_is(f"{experts}down_proj_bias", moe.down_bias),
    ]
    if f"{experts}gate_up_proj_blocks" in stored:
        return [
            *targets,
            _mxfp4(f"{experts}gate_up_proj", gate_up_NF2E),
            _mxfp4(f"{experts}down_proj", moe.down),
        ]
    return [
        *targets,
        _side_by_side(f"{experts}gate_up_proj", gate_up_NF2E.permute(0, 3, 1, 2)),
        _as_it_is(f"{experts}down_proj", moe.down.transpose(1, 2)),
    ]


def _side_by_side(name: str, destination: Tensor) -> Target:
    """Gate and up are the destination's last dimension, which is folded into the one before where they are stored."""
    *outer, inner, two = destination.shape
    return Target(destination, {name: (*outer, inner * two)}, transform=lambda x: x.view(destination.shape))


def _mxfp4(name: str, destination: Tensor) -> Target:
    """`destination` is [N, rows..., columns] with 32 columns to a block, stored as [N, rows, blocks, 16] bytes."""
    num_experts, columns = destination.shape[0], destination.shape[-1]
    rows = destination[0, ..., 0].numel()
    blocks = (num_experts, rows, columns // 32, 16)
    sources = {f"{name}_blocks": blocks, f"{name}_scales": blocks[:-1]}
    return Target(destination, sources, BYTES, partial(_dequantise_like, destination))


def _dequantise_like(destination: Tensor, blocks: Tensor, scales: Tensor) -> Tensor:
    """On the destination's device, expert by expert: what is in between needs more memory than the result."""
    out = torch.empty(destination.shape, dtype=destination.dtype, device=destination.device)
    for part, expert_blocks, expert_scales in zip(out, blocks, scales, strict=True):
        value = dequantise_mxfp4(expert_blocks.to(out.device), expert_scales.to(out.device), out.dtype)
        part.copy_(value.view(part.shape))
    return out


def dequantise_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., G, 16] bytes with the exponents [..., G] (biased by 127) of their G blocks -> [..., 32 G] in `dtype`."""
    values = torch.tensor(_FP4_VALUES, dtype=torch.float32, device=blocks.device)
    halves = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1)
    mantissas = values[halves.int()].flatten(-2)
    return torch.ldexp(mantissas, scales.int().unsqueeze(-1) - _SCALE_BIAS).flatten(-2).to(dtype)
