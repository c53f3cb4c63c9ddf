"""Tokens of a folder are those of transformers' AutoTokenizer, the tokens in front included; bytes add up; a stream of
tokens is the text."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fa_research.config import ModelConfig
from fa_research.errors import CheckpointError
from fa_research.models.tokenizer import ByteTokenizer, FileTokenizer, load_tokenizer
from tests.models.checkpoints import PEERS, edit_config, save, tokenizers, transformers

TEXT = (
    "def naïve(x):\n\treturn  x + 1  # 数学, é\n\n\n    pass  🙂🙃 \r\n  'quoted' ﬁne\u0301 <s> and <s>\n" * 3
)
CORPUS = [TEXT, "is followed by " * 9, "0123456789", "    return None\n" * 5]
SPECIAL = ["<unk>", "<s>", "</s>"]


def _byte_level() -> Any:
    """As GPT-2, Llama 3 and Qwen."""
    built = tokenizers.Tokenizer(tokenizers.models.BPE())
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    return _trained(built, initial_alphabet=alphabet)


def _byte_fallback(metaspace: bool) -> Any:
    """As Llama 2 and Mistral (a blank before the text) or as Gemma."""
    names = [f"<0x{value:02X}>" for value in range(256)]
    model = tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    built, decoders = tokenizers.Tokenizer(model), tokenizers.decoders
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metaspace:
        built.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        built.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    built.decoder = decoders.Sequence(steps)
    trained = _trained(built, limit_alphabet=30, special=[*SPECIAL, *names])
    return _without_special(trained, names)


def _trained(built: Any, special: list[str] = SPECIAL, **options: Any) -> Any:
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, show_progress=False, **options
    )
    built.train_from_iterator(CORPUS, trainer)
    return built


def _without_special(built: Any, names: list[str]) -> Any:
    """The names stay in the vocabulary, and are no special tokens any more."""
    raw = json.loads(built.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] not in names]
    return tokenizers.Tokenizer.from_str(json.dumps(raw))


def _template(built: Any, single: str) -> Any:
    processors = tokenizers.processors
    template = processors.TemplateProcessing(
        single=single, special_tokens=[(name, built.token_to_id(name)) for name in SPECIAL]
    )
    if built.post_processor is None:
        built.post_processor = template
    return built


KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "byte-level with a front": (lambda: _template(_byte_level(), "<s> $A"), {}, "llama"),
    "front and end": (lambda: _template(_byte_level(), "<s>:0 $A:0 </s>:0"), {}, "llama"),
    "two in front": (lambda: _template(_byte_level(), "</s> <s> $A"), {}, "llama"),
    "an end alone": (lambda: _template(_byte_level(), "$A </s>"), {}, "llama"),
    "no front": (_byte_level, {}, "qwen3"),
    "a front asked for beside it": (_byte_level, {"add_bos_token": True, "bos_token": "<s>"}, "llama"),
    "no front asked for beside it": (lambda: _template(_byte_level(), "<s> $A"), {"add_bos_token": False}, "llama"),
    "byte fallback, blank in front": (
        lambda: _template(_byte_fallback(True), "<s> $A"),
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False},
        "llama",
    ),
    "byte fallback": (lambda: _template(_byte_fallback(False), "<s> $A"), {"bos_token": "<s>"}, "mistral"),
}  # fmt: skip


def _folder(kind: str, folder: Path) -> Path:
    make, options, peer = KINDS[kind]
    save(PEERS[peer], folder, vocab_size=420)
    make().save(str(folder / "tokenizer.json"))
    known = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(known | {"unk_token": "<unk>"} | options))
    return folder


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return _folder(request.param, tmp_path)


def _ours(folder: Path) -> FileTokenizer:
    found = load_tokenizer(ModelConfig(path=str(folder), vocab_size=420))
    assert isinstance(found, FileTokenizer)
    return found


def test_tokens_and_what_goes_before_them(folder: Path, request: pytest.FixtureRequest) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = _ours(folder)
    kind = request.node.callspec.params["folder"]
    end = [2] if "end" in kind else []
    for text in (TEXT, "a", " a", "\n", "é", "def main(", ""):
        expected = theirs(text)["input_ids"]
        assert ours.leading_ids + ours.encode(text.encode()).ids + end == expected
    fronts = {"two in front": [2, 1], "no front": [], "an end alone": [], "a front asked for beside it": []}
    assert ours.leading_ids == fronts.get(kind, [1])


def test_bytes_add_up(folder: Path) -> None:
    ours = _ours(folder)
    for text in (TEXT, "def f(x):\n    return x  \n" * 4, "🙂", "x "):
        tokens = ours.encode(text.encode())
        assert sum(tokens.num_bytes) == len(text.encode()) and min(tokens.num_bytes) >= 0


def test_a_slice_of_tokens_has_the_bytes_of_its_text(folder: Path) -> None:
    # from two tokens on: a blank put before the text counts with the first character
    text = "while True:\n    print('is followed by', 0123)\n" * 3
    ours = _ours(folder)
    tokens = ours.encode(text.encode())
    for start in range(0, len(tokens.ids), 3):
        for end in range(start + 2, min(start + 9, len(tokens.ids))):
            first, stop = sum(tokens.num_bytes[:start]), sum(tokens.num_bytes[:end])
            shown = "".join(map((stream := ours.stream()).put, tokens.ids[:end])) + stream.end()
            assert shown == text[:stop]
            assert text[first:stop].strip() == _decoded(folder, tokens.ids[start:end]).strip()


def _decoded(folder: Path, ids: list[int]) -> str:
    text: str = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).decode(ids)
    return text


def test_a_stream_is_the_text(folder: Path) -> None:
    ours = _ours(folder)
    for text in (TEXT, "🙂🙃é数", " x", "\t\n "):
        ids = ours.leading_ids + ours.encode(text.encode()).ids
        pieces = _pieces(ours, ids)
        assert "".join(pieces) == _decoded(folder, ids)
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_stream_of_any_tokens_is_their_text(folder: Path) -> None:
    """What a model without training writes: bytes that are no characters, special tokens. Only a run of byte-fallback
    tokens is left out: as a whole it may be no text where its beginning was, and a stream takes nothing back."""
    rng, ours, size = random.Random(0), _ours(folder), 0
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [i for i in range(library.get_vocab_size()) if not library.id_to_token(i).startswith("<0x")]
    for _ in range(20):
        some = rng.sample(ids, 30)
        written = "".join(_pieces(ours, some))
        assert written.replace("\ufffd", "") == _decoded(folder, some).replace("\ufffd", "")
        size += len(written)
    assert size > 600


def _pieces(ours: FileTokenizer | ByteTokenizer, ids: list[int]) -> list[str]:
    stream = ours.stream()
    return [*map(stream.put, ids), stream.end()]


def test_bytes_as_tokens() -> None:
    ours, text = ByteTokenizer(), TEXT.encode()
    tokens = ours.encode(text)
    assert bytes(tokens.ids) == text and list(tokens.num_bytes) == [1] * len(text) and ours.leading_ids == []
    assert "".join(_pieces(ours, tokens.ids)) == TEXT
    rng = random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(256) for _ in range(40)]
        assert "".join(_pieces(ours, ids)) == bytes(ids).decode(errors="replace")
    assert "".join(_pieces(ours, [104, 226, 300, 105, 226])) == "h\ufffd\ufffdi\ufffd"


def test_what_is_cut_or_padded_in_the_file_is_not_here(tmp_path: Path) -> None:
    folder = _folder("byte-level with a front", tmp_path)
    whole = _ours(folder).encode(TEXT.encode()).ids
    changed = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    changed.enable_truncation(7)
    changed.enable_padding(length=900)
    changed.save(str(folder / "tokenizer.json"))
    assert _ours(folder).encode(TEXT.encode()).ids == whole
    assert _ours(folder).leading_ids == [1]


@pytest.mark.parametrize(("in_config", "in_generation", "expected"), [
    (None, ..., set()), (2, ..., {2}), ([2, 9], ..., {2, 9}), (2, 7, {7}), (2, [7, 8], {7, 8}), (2, None, {2}),
])  # fmt: skip
def test_what_ends_a_text(tmp_path: Path, in_config: Any, in_generation: Any, expected: set[int]) -> None:
    folder = _folder("no front", tmp_path)
    edit_config(folder, eos_token_id=in_config)
    (folder / "generation_config.json").unlink()
    if in_generation is not ...:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": in_generation}))
    assert _ours(folder).eos == expected
    (folder / "tokenizer.json").unlink()
    assert load_tokenizer(ModelConfig(path=str(folder))).eos == expected


@pytest.mark.parametrize("wrong", ["7", [[7]], True, 2.0, [2, None]])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_that_is_no_token_id_is_named(tmp_path: Path, name: str, wrong: Any) -> None:
    (tmp_path / name).write_text(json.dumps({"eos_token_id": wrong}))
    says = re.escape(f"{name}: eos_token_id={json.dumps(wrong)}: expected a token id")
    with pytest.raises(CheckpointError, match=says):
        load_tokenizer(ModelConfig(path=str(tmp_path), vocab_size=420))


def test_a_broken_generation_config_is_named(tmp_path: Path) -> None:
    folder = _folder("no front", tmp_path)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"model.path: .*generation_config.json cannot be read"):
        _ours(folder)
