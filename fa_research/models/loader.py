"""Weights of a Hugging Face folder (safetensors, in one file or in shards) into a model that exists already.

Names, shapes and dtypes are compared first. Then each tensor goes straight to its rows of the fused parameters
(`transfer.py`): on the host there is never a second copy of more than a few pieces of the files. What differs from one
writer of checkpoints to the next is read as transformers 5.23 reads it: names without `model.`, buffers that are no
weights, a tied head that is stored beside the embedding or in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from fa_research.errors import CheckpointError
from fa_research.models.checkpoint_files import DTYPES, Stored, name_some, stored_tensors
from fa_research.models.decoder import Decoder
from fa_research.models.experts import FLOATS, Target
from fa_research.models.names import EMBEDDING, HEAD, weight_targets
from fa_research.models.transfer import Transfer

# Buffers of older checkpoints that are no weights: the causal mask, and the rotation, which config.json gives too.
_BUFFERS = (
    ".self_attn.bias", ".self_attn.masked_bias", ".rotary_emb.inv_freq", ".rotary_emb.cos_cached",
    ".rotary_emb.sin_cached",
)  # fmt: skip
_COMPARED = 16 << 20  # elements of a head and an embedding that are compared at once

# Given what is done and how many steps it takes: a context that yields the function to call after each step.
Progress = Callable[[str, int], AbstractContextManager[Callable[[], object]]]


def silent(what: str, total: int) -> AbstractContextManager[Callable[[], object]]:
    """No progress shown."""
    return nullcontext(lambda: None)


@torch.no_grad()
def load_weights(model: Decoder, folder: Path, progress: Progress = silent) -> None:
    """Fill all weights of `model` from `folder`, whatever floating dtype they are stored in. Nothing is written before
    every name, shape and dtype has been checked. A tied model whose folder stores another head than the embedding gets
    a head of its own (`Decoder.untie`), as in transformers 5.23.

    Raises:
        CheckpointError: safetensors is not installed; no such files; a file (named) that is corrupt, truncated or not
            there; missing, surplus and misshapen tensors, all of them in one error; or NaN or infinite weights.
    """
    stored = _by_full_name(stored_tensors(folder))
    targets = weight_targets(model, stored.keys())
    own_head = None
    if model.head is model.embedding and HEAD in stored:
        if EMBEDDING not in stored:
            targets[EMBEDDING] = Target(model.embedding, {HEAD: tuple(model.embedding.shape)})
        elif not _are_same(stored[HEAD], stored[EMBEDDING], model.embedding.dtype):
            own_head = torch.empty_like(model.embedding)
            targets[HEAD] = Target(own_head, {HEAD: tuple(own_head.shape)})
    _check(folder, targets, stored)
    if own_head is not None:
        model.untie(own_head)
    loads = [(target, [stored[name] for name in target.sources]) for target in targets.values()]
    loads.sort(key=lambda load: (load[1][0].path, load[1][0].offset))  # as they lie on the disk
    with (
        progress(f"loading {model.config.name}", len(loads)) as tick,
        Transfer(model.embedding.device) as transfer,
    ):
        sums = []
        for target in transfer.run(loads):
            sums.append((target, target.destination.sum()))
            tick()
    _check_finite(folder, sums)


def _by_full_name(stored: dict[str, Stored]) -> dict[str, Stored]:
    """The tensors by their names in a model with a head. Checkpoints saved without one have no `model.` in front."""

    def full(name: str) -> str:
        return name if name == HEAD or name.startswith("model.") else f"model.{name}"

    return {name if full(name) in stored else full(name): tensor for name, tensor in stored.items()}


def _are_same(head: Stored, table: Stored, dtype: torch.dtype) -> bool:
    """Whether two stored tensors are the same once they are `dtype`."""
    if head.shape != table.shape or not {head.dtype, table.dtype} <= FLOATS:
        return False
    if head.dtype == table.dtype and torch.equal(head.map(), table.map()):
        return True
    count = head.num_bytes // DTYPES[head.dtype].itemsize

    def part(stored: Stored, begin: int) -> Tensor:
        size = DTYPES[stored.dtype].itemsize
        piece = stored.map()[begin * size : (begin + _COMPARED) * size]
        return piece.clone().view(DTYPES[stored.dtype]).to(dtype)  # a copy is aligned

    return all(torch.equal(part(head, i), part(table, i)) for i in range(0, count, _COMPARED))


def _check_finite(folder: Path, sums: list[tuple[Target, Tensor]]) -> None:
    """Raises CheckpointError that names the weights that are not finite. The sum of a tensor with NaN or infinite
    elements is not finite either, and one reduction finds it; the device is waited for once. A sum may also overflow,
    so the elements are counted before anything is said."""
    finite = torch.stack([total.isfinite() for _, total in sums]).tolist()
    found, overflows = [], False
    for target in (target for (target, _), is_finite in zip(sums, finite, strict=True) if not is_finite):
        weight = target.destination
        nan, infinite = int(weight.isnan().sum()), int(weight.isinf().sum())
        overflows |= infinite > 0 and weight.dtype == torch.float16
        counts = [f"{count:,} {kind}" for count, kind in ((nan, "NaN"), (infinite, "infinite")) if count]
        if counts:
            found.append(f"{', '.join(target.sources)} ({' and '.join(counts)} of {weight.numel():,})")
    if found:
        hint = (
            "float16 ends at 65,504: try model.dtype=bfloat16 or float32" if overflows else "fetch it again"
        )
        raise CheckpointError(
            f"model.path={folder} has weights that are not finite: {name_some(found)}; {hint}"
        )


def _check(folder: Path, targets: dict[str, Target], stored: dict[str, Stored]) -> None:
    """Raises CheckpointError with all that keeps the tensors from being the model's."""
    problems = []
    shapes = {name: shape for target in targets.values() for name, shape in target.sources.items()}
    dtypes = {name: target.dtypes for target in targets.values() for name in target.sources}
    if missing := [name for name in shapes if name not in stored]:
        problems.append(f"missing: {name_some(missing)}")
    # A head without a target is that of a tied model, and equals the embedding.
    if surplus := [
        stored[n].name for n in stored if n not in shapes and n != HEAD and not n.endswith(_BUFFERS)
    ]:
        problems.append(f"not part of the model: {name_some(surplus)}")
    found = {name: stored[name] for name in shapes if name in stored}
    if misshapen := [
        f"{tensor.name} is {list(tensor.shape)} and should be {list(shapes[name])}"
        for name, tensor in found.items()
        if tensor.shape != shapes[name]
    ]:
        problems.append(f"wrong shape: {name_some(misshapen)}")
    for allowed in dict.fromkeys(dtypes.values()):
        unread = [t for name, t in found.items() if dtypes[name] == allowed and t.dtype not in allowed]
        if named := [f"{tensor.name} is {tensor.dtype}" for tensor in unread]:
            problems.append(f"wrong dtype, not one of {', '.join(sorted(allowed))}: {name_some(named)}")
    if problems:
        raise CheckpointError(
            f"the tensors in model.path={folder} are not those that its config.json asks for: {'; '.join(problems)}"
        )
