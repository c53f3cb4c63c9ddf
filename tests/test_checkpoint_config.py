"""A folder's config.json as the model's shape: what it decides, and which keys stay the user's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from fa_research.config import (
    Config,
    Dtype,
    LocalConfig,
    MaskConfig,
    ModelConfig,
    config_hash,
    load_config,
    to_plain,
)
from fa_research.config.checkpoint import take_from_folder
from fa_research.config.store import CONFIG_DIR, register
from fa_research.errors import ConfigError

# Whole numbers no two of which are alike, so that swapped fields show.
SIZES = {
    "num_hidden_layers": 3, "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 80, "vocab_size": 300, "max_position_embeddings": 4100,
}  # fmt: skip
LLAMA_3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def raw(architecture: str = "Llama", **changes: Any) -> dict[str, Any]:
    """A config.json; `...` removes a key."""
    keys = {"architectures": [f"{architecture}ForCausalLM"], "rms_norm_eps": 1e-5, **SIZES, **changes}
    return {key: value for key, value in keys.items() if value is not ...}


def folder_of(path: Path, architecture: str = "Llama", **changes: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw(architecture, **changes)))
    return path


def composed(*overrides: str, hydra: bool = False) -> Any:
    register()
    with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=hydra)


def test_the_folder_decides_the_shape(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "My-Model", "Qwen2")
    config = load_config(composed(f"model.path={folder}", "model.dtype=float16"), [f"model.path={folder}"])
    model = config.model
    assert (model.name, model.path, model.dtype) == ("My-Model", str(folder), Dtype.float16)
    assert (model.num_layers, model.vocab_size, model.qkv_bias) == (3, 300, True)
    assert to_plain(config)["model"]["num_layers"] == 3
    assert load_config(composed(f"model.path={folder}", "model.name=mine")).model.name == "mine"


def test_checks_across_keys_see_the_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, max_position_embeddings=5000)
    overrides = [f"model.path={folder}", "workload=decode", "workload.steps=1"]
    load_config(composed(*overrides, "workload.context_len=4999"))  # more than the default model has
    with pytest.raises(ConfigError, match="must be at most model.max_context_len=5000"):
        load_config(composed(*overrides, "workload.context_len=5000"))
    with pytest.raises(ConfigError, match="model.head_dim=15: must be even"):
        load_config(composed(f"model.path={folder_of(tmp_path, head_dim=15)}"))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.num_layers=5", r"decides model.num_layers=3 \(given: 5\); leave it out"),
        (
            "model.num_layers=2",
            r"decides model.num_layers=3 \(given: 2\); leave it out",
        ),  # the default, but typed
        ("++model.sink=true", r"model.sink=False \(given: True\)"),
        (
            "model=llama3_8b",
            r"model.num_layers=3 \(given: 32\), model.hidden_size=96 \(given: 4096\).*leave them",
        ),
    ],
)
def test_a_key_that_the_folder_decides_cannot_be_set(override: str, says: str, tmp_path: Path) -> None:
    overrides = [f"model.path={folder_of(tmp_path, 'Mistral')}", override]
    with pytest.raises(ConfigError, match=says):
        load_config(composed(*overrides), overrides)


def test_a_choice_that_agrees_with_the_folder_is_fine(tmp_path: Path) -> None:
    shape = load_config(composed("model=llama3_1b")).model
    rope = {**LLAMA_3, "rope_theta": 5e5}
    sizes = [16, 2048, 32, 8, 8192, 128256, 131072]
    folder = folder_of(
        tmp_path, **dict(zip(SIZES, sizes, strict=True)), rope_parameters=rope, tie_word_embeddings=True
    )
    overrides = ["model=llama3_1b", f"model.path={folder}"]
    assert load_config(composed(*overrides), overrides).model == dataclasses.replace(
        shape, path=str(folder), changed=[]
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "has no config.json"),
        ("{", "config.json is not JSON"),
        ("[1]", "config.json holds no JSON object"),
    ],
)
def test_a_folder_without_a_config(content: str | None, says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=f"model.path.*{tmp_path}.*{says}"):
        take_from_folder(ModelConfig(path=str(tmp_path)))


def test_a_path_that_is_no_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", folder_of(tmp_path) / "config.json", tmp_path / ("long" * 100)):
        with pytest.raises(ConfigError, match=f"model.path={path} is not a folder.*hub are not looked up"):
            take_from_folder(ModelConfig(path=str(path)))


def test_the_hash_is_that_of_the_path(tmp_path: Path) -> None:
    """Known before the folder is read, so that a sweep finds its rows again."""
    paths = [folder_of(tmp_path / name) for name in ("a", "b")]
    asked = [composed(f"model.path={path}") for path in paths]
    loaded = [load_config(cfg) for cfg in asked]
    assert [config_hash(cfg) for cfg in asked] == [config_hash(config) for config in loaded]
    assert len({config_hash(Config()), *map(config_hash, loaded)}) == 3
    loaded[0].model.dtype = Dtype.float16
    assert config_hash(loaded[0]) != config_hash(asked[0])


WINDOWED = {"sliding_window": 64}


@pytest.mark.parametrize(
    ("architecture", "typed", "mask", "local", "softcap", "changed"),
    [
        ("Mistral", [], MaskConfig("sliding_window", 64), LocalConfig(), 0.0, []),
        (
            "Mistral", ["model.mask.size=16"], MaskConfig("sliding_window", 16), LocalConfig(), 0.0, ["mask.size"],
        ),
        ("Mistral", ["model.mask.name=causal"], MaskConfig(), LocalConfig(), 0.0, ["mask.name", "mask.size"]),
        ("Mistral", ["model.mask={name:causal}"], MaskConfig(), LocalConfig(), 0.0, ["mask.name", "mask.size"]),
        (
            "Mistral", ["model.mask.name=chunked", "model.mask.size=32"], MaskConfig("chunked", 32), LocalConfig(), 0.0,
            ["mask.name", "mask.size"],
        ),
        (
            "Gemma2", ["model.softcap=0"], MaskConfig(),
            LocalConfig([True, False], MaskConfig("sliding_window", 64)), 0.0, ["softcap"],
        ),
        (
            "Gemma2", ["model.local.mask.size=8"], MaskConfig(),
            LocalConfig([True, False], MaskConfig("sliding_window", 8)), 50.0, ["local.mask.size"],
        ),
        (
            "Gemma2", ["model.local.pattern=[]", "model.local.mask.size=1024"], MaskConfig(), LocalConfig(), 50.0,
            ["local.pattern", "local.mask.size"],
        ),
        ("Gemma2", ["model.local.pattern=[]"], MaskConfig(), LocalConfig(), 50.0, ["local.pattern"]),
        (
            "Llama", ["model.local.pattern=[true,false]", "model.local.mask.size=8"], MaskConfig(),
            LocalConfig([True, False], MaskConfig("sliding_window", 8)), 0.0, ["local.pattern", "local.mask.size"],
        ),
    ],
)  # fmt: skip
def test_attention_can_be_changed_beside_the_folder(
    architecture: str, typed: list[str], mask: MaskConfig, local: LocalConfig, softcap: float, changed: list[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    overrides = [f"model.path={folder_of(tmp_path, architecture, **WINDOWED)}", *typed]
    model = load_config(composed(*overrides), overrides).model
    assert (model.mask, model.local, model.softcap) == (mask, local, softcap)
    assert model.changed == changed
    assert (model.num_layers, model.vocab_size) == (3, 300)


def test_what_was_changed_is_checked_and_hashed(tmp_path: Path) -> None:
    path = f"model.path={folder_of(tmp_path, 'Gemma2', **WINDOWED)}"
    with pytest.raises(ConfigError, match="model.mask: .*size"):
        load_config(composed(path, "model.mask.size=4"), [path, "model.mask.size=4"])
    cells = [
        [], ["model.softcap=0"], ["model.softcap=30"], ["model.local.mask.size=8"], ["model.local.pattern=[true]"],
        ["model.mask.name=causal"], ["model.mask.name=chunked", "model.mask.size=8"],
    ]  # fmt: skip
    hashes = []
    for cell in cells:
        typed = [path, *cell]
        loaded = load_config(composed(*typed), typed)
        forms = [loaded, to_plain(loaded), composed(*typed, hydra=True)]
        assert len({config_hash(form) for form in forms} | {config_hash(composed(*typed), typed)}) == 1, cell
        hashes.append(config_hash(loaded))
    assert len(set(hashes)) == len(cells)


def test_a_loaded_config_loads_again(tmp_path: Path) -> None:
    """As from the config.yaml beside a row."""
    typed = [f"model.path={folder_of(tmp_path, 'Gemma2', **WINDOWED)}", "model.softcap=0"]
    loaded = load_config(composed(*typed), typed)
    again = composed()
    again.model = loaded.model
    assert load_config(again).model == loaded.model
    assert config_hash(again) == config_hash(loaded)


def test_changed_is_not_for_users(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.changed=\['softcap'\]: is filled in"):
        load_config(composed("model=tiny", "model.changed=[softcap]"))
    folder = folder_of(tmp_path, "Gemma2", **WINDOWED)
    for changed in ("[]", "[vocab_size]", "[no.key]"):
        typed = [f"model.path={folder}", f"model.changed={changed}", "model.softcap=0"]
        with pytest.raises(ConfigError, match="model.changed=.*is filled in"):
            load_config(composed(*typed), typed)
    with pytest.raises(ConfigError, match=r"model.changed=\['vocab_size'\]: is filled in"):
        load_config(composed(f"model.path={folder}", "model.changed=[vocab_size]"))
