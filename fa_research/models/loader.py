"""Weights of a Hugging Face folder (safetensors, in one file or in shards) into a model that exists already.

Names, shapes and dtypes are compared first. Then each tensor goes straight to its rows of the fused parameters
(`transfer.py`): on the host there is never a second copy of more than a few pieces of the files.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from fa_research.errors import CheckpointError
from fa_research.models.checkpoint_files import Stored, name_some, stored_tensors
from fa_research.models.decoder import Decoder
from fa_research.models.experts import Target
from fa_research.models.names import EMBEDDING, HEAD, weight_targets
from fa_research.models.transfer import Transfer

# Given what is done and how many steps it takes: a context that yields the function to call after each step.
Progress = Callable[[str, int], AbstractContextManager[Callable[[], object]]]


def silent(what: str, total: int) -> AbstractContextManager[Callable[[], object]]:
    """No progress shown."""
    return nullcontext(lambda: None)


@torch.no_grad()
def load_weights(model: Decoder, folder: Path, progress: Progress = silent) -> None:
    """Fill all weights of `model` from `folder`, whatever floating dtype they are stored in. Nothing is written before
    every name, shape and dtype has been checked.

    Raises:
        CheckpointError: safetensors is not installed; no such files; a file (named) that is corrupt, truncated or not
            there; or missing, surplus and misshapen tensors, all of them in one error.
    """
    stored = stored_tensors(folder)
    targets = weight_targets(model, stored.keys())
    _check(folder, model, targets, stored)
    loads = [(target, [stored[name] for name in target.sources]) for target in targets.values()]
    loads.sort(key=lambda load: (load[1][0].path, load[1][0].offset))  # as they lie on the disk
    with (
        progress(f"loading {model.config.name}", len(loads)) as tick,
        Transfer(model.embedding.device) as transfer,
    ):
        for _ in transfer.run(loads):
            tick()


def _check(folder: Path, model: Decoder, targets: dict[str, Target], stored: dict[str, Stored]) -> None:
    """Raises CheckpointError with all that keeps the tensors from being the model's."""
    problems = []
    shapes = {name: shape for target in targets.values() for name, shape in target.sources.items()}
    dtypes = {name: target.dtypes for target in targets.values() for name in target.sources}
    if missing := [name for name in shapes if name not in stored]:
        problems.append(f"missing: {name_some(missing)}")
    spare = {name for name in stored if name not in shapes and _is_spare(name, model, stored)}
    if surplus := [_surplus(name) for name in stored if name not in shapes and name not in spare]:
        problems.append(f"not part of the model: {name_some(surplus)}")
    found = [stored[name] for name in shapes if name in stored]
    if misshapen := [
        f"{tensor.name} is {list(tensor.shape)} and should be {list(shapes[tensor.name])}"
        for tensor in found
        if tensor.shape != shapes[tensor.name]
    ]:
        problems.append(f"wrong shape: {name_some(misshapen)}")
    for allowed in dict.fromkeys(dtypes.values()):
        unread = [t for t in found if dtypes[t.name] == allowed and t.dtype not in allowed]
        if named := [f"{tensor.name} is {tensor.dtype}" for tensor in unread]:
            problems.append(f"wrong dtype, not one of {', '.join(sorted(allowed))}: {name_some(named)}")
    if problems:
        raise CheckpointError(
            f"the tensors in model.path={folder} are not those that its config.json asks for: {'; '.join(problems)}"
        )


def _is_spare(name: str, model: Decoder, stored: dict[str, Stored]) -> bool:
    """What checkpoints may hold besides: frequencies of the rotation, which config.json gives too; and the head once
    more where it is tied, if it is the same."""
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    if name != HEAD or model.head is not model.embedding or EMBEDDING not in stored:
        return False
    head, table = stored[HEAD], stored[EMBEDDING]
    return (head.dtype, head.shape) == (table.dtype, table.shape) and torch.equal(head.map(), table.map())


def _surplus(name: str) -> str:
    """A head that is part of no model can only belong to a tied one."""
    return f"{name} (differs from the tied embedding)" if name == HEAD else name
