"""Weights of a Hugging Face folder (safetensors, in one file or in shards) into a model that exists already.

Files are mapped into memory, and each tensor goes straight to its rows of the fused parameters, converted and sent to
the device on the way: on the host there is never a second copy of more than one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fa_research.errors import CheckpointError
from fa_research.models.decoder import Decoder
from fa_research.models.layers import DecoderLayer

# Given what is done and how many steps it takes: a context that yields the function to call after each step.
Progress = Callable[[str, int], AbstractContextManager[Callable[[], object]]]

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
_DTYPES = {"F64", "F32", "F16", "BF16"}
_NAMED = 50  # names of one kind of problem in a message; the rest is counted


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
    targets = weight_targets(model)
    with ExitStack() as files:
        sources = _open_files(folder, files)
        _check(folder, model, targets, sources)
        with progress(f"loading {model.config.name}", len(targets)) as tick:
            for name, target in targets.items():
                target.copy_(_read(folder, name, sources[name]))
                tick()


def weight_targets(model: Decoder) -> dict[str, Tensor]:
    """Name in a checkpoint -> where it goes: a parameter, or the rows of a fused one that are its own."""
    targets: dict[str, Tensor] = {
        "model.embed_tokens.weight": model.embedding,
        "model.norm.weight": model.final_norm_E,
    }
    if model.head is not model.embedding:
        targets[HEAD] = model.head
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        targets |= {f"model.layers.{i}.{name}": target for name, target in _layer_targets(layer).items()}
    return targets


def _layer_targets(layer: DecoderLayer) -> dict[str, Tensor]:
    rows = [heads * layer.head_dim for heads in layer.heads]
    projections = [f"self_attn.{letter}_proj" for letter in "qkv"]
    targets = {f"{name}.weight": part for name, part in zip(projections, layer.qkv.split(rows), strict=True)}
    if layer.qkv_bias is not None:
        biases = layer.qkv_bias.split(rows)
        targets |= {f"{name}.bias": part for name, part in zip(projections, biases, strict=True)}
    if layer.q_norm_D is not None and layer.k_norm_D is not None:
        targets |= {"self_attn.q_norm.weight": layer.q_norm_D, "self_attn.k_norm.weight": layer.k_norm_D}
    gate, up = layer.mlp.gate_up.chunk(2)
    return targets | {
        "self_attn.o_proj.weight": layer.o,
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": layer.mlp.down,
        "input_layernorm.weight": layer.input_norm_E,
        "post_attention_layernorm.weight": layer.mlp_norm_E,
    }


def _open_files(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Name of each tensor in the folder -> the open file that holds it."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise CheckpointError(
            f"model.path needs the package safetensors, which cannot be imported ({error}); "
            'it comes with the extra hf: pip install -e ".[hf]"'
        ) from error
    sources: dict[str, Any] = {}
    for path in _weight_files(folder):
        try:
            file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"model.path: {path} cannot be read: {error}; it is corrupt, truncated "
                "or no safetensors file: fetch it again"
            ) from error
        if twice := sorted(sources.keys() & set(file.keys())):
            raise CheckpointError(
                f"model.path: {path} holds tensors that another file holds too: {_names(twice)}"
            )
        sources |= dict.fromkeys(file.keys(), file)
    return sources


def _weight_files(folder: Path) -> list[Path]:
    """The one file, or the shards that the index names."""
    if (folder / ONE_FILE).exists():
        return [folder / ONE_FILE]
    if (folder / INDEX).exists():
        files = [folder / name for name in _shards(folder / INDEX)]
        if absent := [file.name for file in files if not file.exists()]:
            raise CheckpointError(f"model.path={folder} lacks shards that {INDEX} names: {_names(absent)}")
        return files
    found = sorted(
        file.name for file in folder.glob("*") if file.suffix in {".safetensors", ".bin", ".pth", ".gguf"}
    )
    there = f"; it has {_names(found)}" if found else ""
    hint = (
        "; convert them to safetensors first"
        if any(not name.endswith(".safetensors") for name in found)
        else ""
    )
    raise CheckpointError(f"model.path={folder} has neither {ONE_FILE} nor {INDEX}{there}{hint}")


def _shards(index: Path) -> list[str]:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({str(name) for name in files})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"model.path: {index} is no index of shards ({type(error).__name__}: {error}); fetch it again"
        ) from error


def _check(folder: Path, model: Decoder, targets: dict[str, Tensor], sources: dict[str, Any]) -> None:
    """Raises CheckpointError with all that keeps the tensors from being the model's."""
    problems = []
    if missing := [name for name in targets if name not in sources]:
        problems.append(f"missing: {_names(missing)}")
    spare = {name for name in sources if _is_spare(folder, name, model, sources)}
    if surplus := [_surplus(name) for name in sources if name not in targets and name not in spare]:
        problems.append(f"not part of the model: {_names(surplus)}")
    slices = {name: sources[name].get_slice(name) for name in targets if name in sources}
    shapes = {name: list(part.get_shape()) for name, part in slices.items()}
    if misshapen := [
        f"{name} is {shapes[name]} and should be {list(targets[name].shape)}"
        for name in slices
        if shapes[name] != list(targets[name].shape)
    ]:
        problems.append(f"wrong shape: {_names(misshapen)}")
    kinds = {name: part.get_dtype() for name, part in slices.items()}
    if unread := [f"{name} is {kind}" for name, kind in kinds.items() if kind not in _DTYPES]:
        problems.append(f"wrong dtype, not one of {', '.join(sorted(_DTYPES))}: {_names(unread)}")
    if problems:
        raise CheckpointError(
            f"the tensors in model.path={folder} are not those that its config.json asks for: {'; '.join(problems)}"
        )


def _is_spare(folder: Path, name: str, model: Decoder, sources: dict[str, Any]) -> bool:
    """What checkpoints may hold besides: frequencies of the rotation, which config.json gives too; and the head once
    more where it is tied, if it is the same."""
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    table = "model.embed_tokens.weight"
    tied = name == HEAD and model.head is model.embedding and table in sources
    return tied and torch.equal(_read(folder, name, sources[name]), _read(folder, table, sources[table]))


def _surplus(name: str) -> str:
    """A head that is part of no model can only belong to a tied one."""
    return f"{name} (differs from the tied embedding)" if name == HEAD else name


def _read(folder: Path, name: str, file: Any) -> Tensor:
    from safetensors import SafetensorError

    try:
        tensor: Tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"model.path={folder}: {name} cannot be read: {error}; fetch its file again"
        ) from error
    return tensor


def _names(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return ", ".join(listed[:_NAMED]) + more
