"""Muon for the matrices of the layers (momentum made orthogonal by Newton-Schulz; Jordan et al., 2024, with the step's
size matched to AdamW's as in Moonlight, 2025), AdamW for the rest.

`torch.optim.Muon` does the same matrix by matrix; here all matrices of a shape go together, in a tenth of the launches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(stack_NRC: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: singular values end in about [0.7, 1.2]. bfloat16."""
    x = stack_NRC.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Matrices only. `torch.optim.Muon(adjust_lr_fn="match_rms_adamw", nesterov=True)`, batched."""

    def __init__(
        self, matrices: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        shapes = sorted({tuple(p.shape) for p in matrices})
        groups = [{"params": [p for p in matrices if tuple(p.shape) == shape]} for shape in shapes]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params, momentum = group["params"], group["momentum"]
            grad = torch.stack([p.grad for p in params])
            state = self.state[params[0]]
            if not state:
                state["momentum"] = torch.zeros_like(grad)
            buffer = state["momentum"].lerp_(grad, 1 - momentum)
            update = orthogonalise(grad.lerp(buffer, momentum)).to(grad.dtype)
            scale = group["lr"] * 0.2 * max(params[0].shape) ** 0.5
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(update.unbind()), alpha=-scale)


def make_optimizers(
    model: nn.Module, name: str, lr: float, embed_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """name: `muon` or `adamw` (then everything). Norms and embedding do not decay, and learn at `embed_lr`."""
    named = list(model.named_parameters())
    matrices = [p for key, p in named if p.ndim == 2 and "layers." in key]
    rest = [p for key, p in named if not (p.ndim == 2 and "layers." in key)]
    fused = {"betas": (0.9, 0.95), "fused": True}
    others = torch.optim.AdamW(rest, lr=embed_lr, weight_decay=0.0, **fused)  # type: ignore[arg-type]
    if name == "muon":
        return [Muon(matrices, lr, weight_decay), others]
    if name == "adamw":
        return [torch.optim.AdamW(matrices, lr=lr, weight_decay=weight_decay, **fused), others]  # type: ignore[arg-type]
    raise ValueError(f"optimizer={name}: choose muon or adamw")
