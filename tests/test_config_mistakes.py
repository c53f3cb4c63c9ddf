"""Every mistake in a config gets one line that names the key and a way out, and errors survive their trip."""

from __future__ import annotations

import dataclasses
import pickle
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

import pytest
import yaml
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml.error import MarkedYAMLError

from fa_research.config import Config, GraphMode, load_config
from fa_research.config.explain import explain
from fa_research.config.schemas import WORKLOADS
from fa_research.config.yaml_words import hint
from fa_research.errors import BackendUnavailable, ConfigError, FaResearchError, KVCacheFull, Unsupported
from tests.test_config import composed, hydra_configs

__all__ = ["hydra_configs"]  # pytest finds a module's fixtures by their names in it


def message_of(*overrides: str) -> str:
    """What a user reads who gives these overrides, whether composition or conversion refuses them."""
    try:
        load_config(composed(*overrides))
    except Exception as error:
        return str(error) if isinstance(error, FaResearchError) else explain(error)
    pytest.fail(f"{overrides} was accepted")


# overrides -> what the message must contain: the key, what was given, what would work
MISTAKES: list[tuple[list[str], list[str]]] = [
    # unknown keys, plain and forced
    (["kv.pagesize=3"], ["unknown key kv.pagesize", "did you mean kv.page_size?", "kv.churn"]),
    (["+kv.pagesize=3"], ["unknown key kv.pagesize", "did you mean kv.page_size?"]),
    (["++kv.pagesize=3"], ["unknown key kv.pagesize", "did you mean kv.page_size?"]),
    (["+bar=1"], ["unknown key bar", "keys here: study, seed"]),
    (["+bar.baz.x=1"], ["unknown key bar"]),
    (["modle=tiny"], ["unknown key modle", "did you mean model?"]),
    (["+model.rope_scaling.facto=2"], ["unknown key model.rope_scaling.facto", "model.rope_scaling.factor?"]),
    (["model.mask={name:chunked,siz:3}"], ["unknown key model.mask.siz", "did you mean model.mask.size?"]),
    (["workload.context_len=8"], ["unknown key workload.context_len", "workload=decode and workload=mixed"]),
    (["+workload.context_len=8"], ["unknown key workload.context_len", "workload=decode and workload=mixed"]),
    # unknown choices
    (["backend=fa9"], ["backend=fa9 is unknown", "choose one of auto, "]),
    (["page_size=16"], ["unknown key page_size", "did you mean kv.page_size?"]),
    (["+page_size=16"], ["unknown key page_size", "did you mean kv.page_size?"]),
    (["mask.size=16"], ["unknown key mask", "did you mean model.mask"]),
    (["batch_size=4"], ["unknown key batch_size", "did you mean workload.batch_size?"]),
    (["mode=off"], ["unknown key mode", "did you mean cuda_graph.mode or tracking.mode?"]),
    (["steps=4"], ["unknown key steps", "did you mean workload.steps?"]),
    (["DEVICE=cpu"], ["unknown key DEVICE", "did you mean device?"]),
    (["backend.options.x=1"], ["unknown key backend.options.x", "+backend.options.x=..."]),
    (["workload=txt"], ["workload=txt is unknown", "did you mean text?"]),
    (["experiment=nope"], ["experiment=nope is unknown", "first_ablation"]),
    (["device=tpu"], ["device='tpu'", "one of auto, cpu, cuda"]),
    (["cuda_graph.mode=maybe"], ["cuda_graph.mode='maybe'", "one of auto, on, off, simulate"]),
    (["model.dtype=float64"], ["model.dtype='float64'", "one of auto, float16, bfloat16, float32"]),
    (["measure.l2=hot"], ["measure.l2='hot'", "one of cold, warm"]),
    (["tracking.mode=yes"], ["tracking.mode='yes'", "auto, online, offline, disabled"]),
    (["workload.level=layer"], ["workload.level='layer'", "one of model, attention"]),
    (["model.mask.name=slidin"], ["model.mask", "slidin", "causal, chunked, full, sliding_window"]),
    (["kv=3"], ["a group takes the name of one of its choices"]),
    # wrong types
    (["kv.page_size=abc"], ["kv.page_size='abc'", "expected an integer"]),
    (["kv.page_size=1.5"], ["kv.page_size=1.5", "expected an integer"]),
    (["kv.page_size=null"], ["kv.page_size=null", "expected an integer"]),
    (["kv.page_size=???"], ["kv.page_size has no value", "an integer"]),
    (["kv.churn=maybe"], ["kv.churn='maybe'", "true or false"]),
    (["kv.num_pages=many"], ["kv.num_pages='many'", "an integer or null"]),
    (["cuda_graph.batch_sizes=[1,x]"], ["cuda_graph.batch_sizes[1]='x'", "expected an integer"]),
    (["cuda_graph.batch_sizes=8"], ["cuda_graph.batch_sizes=8", "a list, each item an integer"]),
    (["tracking.tags=x"], ["tracking.tags='x'", "a list"]),
    (["model.rope_scaling=null"], ["model.rope_scaling=null", "a group with the keys type, factor"]),
    (["~kv.page_size"], ["kv.page_size cannot be removed"]),
    (["~workload"], ["no workload chosen", "decode, extend, generate, mixed, text"]),
    (["kv.page_size=1,2"], ["kv.page_size=[1,2]", "kv.page_size=1,2", "--multirun"]),
    (["backend=a=b"], ["cannot read the override 'backend=a=b'"]),
    (["model.rope_theta=${nowhere}"], ["model.rope_theta", "nowhere"]),
    # values out of range
    (["kv.page_size=0"], ["kv.page_size=0", "from 1 to 256"]),
    (["kv.page_size=257"], ["kv.page_size=257", "from 1 to 256"]),
    (["kv.num_pages=0"], ["kv.num_pages=0", "at least 1"]),
    (["kv.memory_fraction=0"], ["kv.memory_fraction=0", "above 0 and at most 1"]),
    (["kv.memory_fraction=1.1"], ["kv.memory_fraction=1.1", "above 0 and at most 1"]),
    (["kv.memory_fraction=nan"], ["kv.memory_fraction=nan"]),
    (["kv.max_requests=0"], ["kv.max_requests=0", "at least 1"]),
    (["kv.reserve_ahead=0"], ["kv.reserve_ahead=0", "at least 1"]),
    (["seed=-1"], ["seed=-1"]),
    (["study=../elsewhere"], ["study='../elsewhere'", "names a folder"]),
    (["study=''"], ["study=''"]),
    (["backend.num_splits=-1"], ["backend.num_splits=-1", "at least 0"]),
    (["model.num_layers=0"], ["model.num_layers=0"]),
    (["model.head_dim=65"], ["model.head_dim=65", "even"]),
    (["model.rope_theta=inf"], ["model.rope_theta=inf"]),
    (["model.rms_norm_eps=0"], ["model.rms_norm_eps=0"]),
    (["model.softcap=-1"], ["model.softcap=-1"]),
    (
        ["model.architecture=Llama"],
        ["model.architecture=Llama", "one of LlamaForCausalLM, MistralForCausalLM"],
    ),
    (["model.logit_softcap=inf"], ["model.logit_softcap=inf", "0 (off) or a positive"]),
    (["model.embedding_scale=0"], ["model.embedding_scale=0"]),
    (["model.attention_scale=-0.1"], ["model.attention_scale=-0.1", "above 0"]),
    (["model.moe.num_experts=-1"], ["model.moe.num_experts=-1"]),
    (["sampling.temperature=-1"], ["sampling.temperature=-1.0", "0 (greedy) or from"]),
    (["sampling.temperature=nan"], ["sampling.temperature=nan"]),
    (["sampling.top_k=-1"], ["sampling.top_k=-1", "0 (all) or a number"]),
    (["sampling.top_p=0"], ["sampling.top_p=0", "above 0 and at most 1"]),
    (["sampling.top_p=1.01"], ["sampling.top_p=1.01"]),
    (["sampling.min_p=-0.1"], ["sampling.min_p=-0.1", "from 0 (all) to 1"]),
    (["sampling.min_p=2"], ["sampling.min_p=2"]),
    (["sampling.seed=-1"], ["sampling.seed=-1", "from 0 to 2**63 - 1"]),
    (["workload.generate=-1"], ["workload.generate=-1", "at least 0"]),
    (["cuda_graph.batch_sizes=[]"], ["cuda_graph.batch_sizes=[]", "cuda_graph.mode=off"]),
    (["cuda_graph.batch_sizes=[4,0]"], ["cuda_graph.batch_sizes=[4, 0]", "positive"]),
    (["cuda_graph.batch_sizes=[4,4]"], ["cuda_graph.batch_sizes=[4, 4]", "repeats"]),
    (["measure.repeats=0"], ["measure.repeats=0"]),
    (["measure.warmup=-1"], ["measure.warmup=-1"]),
    (["measure.max_seconds=0"], ["measure.max_seconds=0"]),
    (["measure.check_requests=0"], ["measure.check_requests=0"]),
    (["workload.prompt_len=0"], ["workload.prompt_len=0", "at least 1"]),
    (["workload.chunk_size=0"], ["workload.chunk_size=0"]),
    (["workload.shared_prefix_len=256"], ["workload.shared_prefix_len=256", "workload.prompt_len - 1 = 255"]),
    (["workload=decode", "workload.batch_size=0"], ["workload.batch_size=0"]),
    (["workload=decode", "workload.length_spread=1"], ["workload.length_spread=1", "below 1"]),
    (["workload=extend", "workload.new_len=0"], ["workload.new_len=0"]),
    (["workload=extend", "workload.prefix_len=-1"], ["workload.prefix_len=-1"]),
    (["workload=mixed", "workload.decode_requests=0"], ["workload.decode_requests=0"]),
    # combinations
    (
        ["kv.num_pages=8", "kv.memory_fraction=0.5"],
        ["kv.num_pages=8 and kv.memory_fraction=0.5", "one of the two"],
    ),
    (["model.num_kv_heads=3"], ["model.num_heads=4 with model.num_kv_heads=3", "multiple"]),
    (
        ["model.moe.num_experts=4", "model.moe.experts_per_token=5"],
        ["per_token=5", "from 1 to model.moe.num_experts=4"],
    ),
    (["model.moe.num_experts=4", "model.moe.experts_per_token=0"], ["model.moe.experts_per_token=0"]),
    (["model.mask.name=chunked"], ["model.mask", "size"]),
    (["model.local.pattern=[true]", "model.local.mask.size=null"], ["model.local.mask: ", "size"]),
    (["model.local.pattern=[true,false]", "model.local.rope_theta=0"], ["model.local.rope_theta=0"]),
    (["model.local.mask.size=64"], ["model.local.pattern=[]", "no layer is local", "[true,false]"]),
    (["model.local.pattern=[false]"], ["model.local.pattern=[False]", "no layer is local"]),
    (["model.rope_scaling.type=linear", "model.rope_scaling.factor=0"], ["model.rope_scaling.factor=0"]),
    (["model.rope_scaling.type=dynamic", "model.head_dim=2"], ["model.head_dim=2 with", "at least 4"]),
    (["model.rope_scaling.type=yarn", "model.rope_theta=1"], ["model.rope_theta=1.0 with", "above 1"]),
    (
        ["model.rope_scaling.type=yarn", "model.rope_scaling.beta_fast=1"],
        ["model.rope_scaling.beta_slow=1.0", "below model.rope_scaling.beta_fast=1.0"],
    ),
    (
        ["model.rope_scaling.type=yarn", "model.rope_scaling.attention_factor=0"],
        ["model.rope_scaling.attention_factor=0"],
    ),
    (
        ["model.rope_scaling.type=longrope", "model.head_dim=4", "model.rope_scaling.short_factor=[1,0]"],
        ["short_factor[1]=0", "long_factor has 0 numbers: must have model.head_dim / 2 = 2"],
    ),
    (
        ["workload.generate=4000", "workload.prompt=null"],
        ["workload.generate=4000 = 4256 tokens", "model.max_context_len=4096"],
    ),
    (["model.mask.size=4"], ["model.mask", "size=4"]),
    (["model.mask.name=sliding_window", "model.mask.size=0"], ["model.mask", "size"]),
    (
        ["model=llama3_8b", "model.rope_scaling.low_freq_factor=4"],
        ["low_freq_factor=4.0", "high_freq_factor=4.0"],
    ),
    (["workload.num_layers=1"], ["workload.num_layers=1", "workload.level=attention"]),
    (
        ["workload.level=attention", "workload.num_layers=3"],
        ["workload.num_layers=3", "model.num_layers=2"],
    ),
    (
        ["workload=decode", "workload.context_len=4090"],
        ["workload.context_len=4090 + workload.steps=16 = 4106 tokens", "model.max_context_len=4096"],
    ),
    (
        ["workload=extend", "workload.prefix_len=4000"],
        ["workload.prefix_len=4000", "model.max_context_len=4096"],
    ),
    (["workload=mixed", "workload.context_len=4096"], ["workload.context_len=4096", "= 4097 tokens"]),
    (
        ["workload=mixed", "workload.prefix_len=4000"],
        ["workload.prefix_len=4000", "model.max_context_len=4096"],
    ),
    (
        ["workload.prompt_len=4090"],
        ["workload.prompt_len=4090", "workload.steps=32", "model.max_context_len=4096"],
    ),
]


@pytest.mark.parametrize(
    ("overrides", "parts"), MISTAKES, ids=[" ".join(overrides) for overrides, _ in MISTAKES]
)
def test_a_mistake_is_one_line_that_names_the_key_and_what_would_work(
    overrides: list[str], parts: list[str]
) -> None:
    # The default model's shape is its folder's.
    chosen = any(override.startswith("model=") for override in overrides)
    message = message_of(*overrides, *([] if chosen else ["model=tiny"]))
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_all_problems_are_reported_at_once() -> None:
    message = message_of("kv.page_size=0", "measure.repeats=0", "workload.prompt_len=0")
    assert all(key in message for key in ("kv.page_size=0", "measure.repeats=0", "workload.prompt_len=0"))


def test_the_limits_themselves_are_accepted() -> None:
    for overrides in (
        ["kv.page_size=1"],
        ["kv.page_size=256"],
        ["kv.memory_fraction=1"],
        ["workload=decode", "workload.context_len=4080"],
        ["workload=mixed", "workload.context_len=4095"],
        ["workload.shared_prefix_len=255"],
        ["workload.shared_prefix_len=0"],
        ["cuda_graph.mode=off", "cuda_graph.batch_sizes=[]"],
        ["model=tiny", "model.moe.num_experts=4", "model.moe.experts_per_token=4"],
        [
            "model=tiny",
            "model.local.pattern=[true,false]",
            "model.local.mask.size=64",
            "model.local.rope_theta=1e4",
        ],
        ["model=tiny", "model.rope_scaling.type=longrope", "model.head_dim=2"]
        + ["model.rope_scaling.short_factor=[1]"]
        + ["model.rope_scaling.long_factor=[4]"],
        ["sampling.top_p=1", "sampling.min_p=1", "sampling.seed=9223372036854775807"],
        ["workload.generate=3840", "workload.prompt=null"],
    ):
        load_config(composed(*overrides))


def test_a_config_without_the_schema_is_refused() -> None:
    with pytest.raises(ConfigError, match="schema/config"):
        load_config(OmegaConf.create({"kv": {"page_size": 1}}))


def test_explain_falls_back_to_the_message_on_one_line() -> None:
    assert explain(OmegaConfBaseException("two\nlines")) == "two lines"


@pytest.mark.parametrize(
    "error",
    [
        BackendUnavailable("fa3", ["no Hopper GPU", "no package"], ["torch", "triton"]),
        Unsupported("fa2", ["head dim 512"], []),
        KVCacheFull(requested=12, free=3),
        ConfigError("kv.page_size=0"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_the_trip_from_another_process(error: FaResearchError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_refusals_list_all_reasons_and_what_would_work() -> None:
    text = str(BackendUnavailable("fa3", ["no Hopper GPU", "no package"], ["torch", "triton"]))
    assert all(part in text for part in ("fa3", "no Hopper GPU", "no package", "torch, triton"))
    assert "none" in str(Unsupported("fa2", ["head dim 512"]))
    full = str(KVCacheFull(12, 3))
    assert all(part in full for part in ("12 pages requested", "3 pages free", "kv.num_pages"))


def keyed(schema: type, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted keys of a schema with their types."""
    for name, kind in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from keyed(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


ENUMS = {
    key: kind
    for key, kind in [
        *keyed(Config),
        *(pair for schema in WORKLOADS.values() for pair in keyed(schema, "workload.")),
    ]
    if isinstance(kind, type) and issubclass(kind, Enum)
}


@pytest.mark.parametrize("word", ["off", "on", "yes", "no", "Off", "true", "null"])
@pytest.mark.parametrize("key", ENUMS)
def test_a_bare_word_of_yaml_in_a_preset_is_the_choice_or_told(key: str, word: str) -> None:
    """For every key with choices: `mode: off` is False when the schema sees it."""
    read = yaml.safe_load(word)
    same = {False: {"off", "no", "false"}, True: {"on", "yes", "true"}, None: set[str]()}[read]
    meant = same & set(ENUMS[key].__members__)
    schema = OmegaConf.structured(Config)
    if len(meant) == 1:
        OmegaConf.update(schema, key, read)
        assert OmegaConf.select(schema, key) is ENUMS[key][meant.pop()]
        return
    with pytest.raises(OmegaConfBaseException) as caught:
        OmegaConf.update(schema, key, read)
    said = explain(caught.value)
    assert said.startswith(f"{key}=") and "expected one of " in said
    assert "YAML reads" in said or (read is None and "none" not in ENUMS[key].__members__)


def test_choices_that_are_spelt_alike_have_to_be_quoted() -> None:
    assert hint(["off", "no", "auto"], False).endswith('so quote it: "off" or "no"')
    assert hint(["off"], "of") == ""


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("tracking:\n  mode: off", "experiment/mine.yaml: tracking.mode=False: expected one of auto,"),
        ("tracking: off", "experiment/mine.yaml: tracking=False: is a group of keys"),
        (
            "defaults:\n  - override /cuda_graph: off",
            'put it in quotes there, as in override /cuda_graph: "off"',
        ),
        ("kv:\n  pagesize: 4", "experiment/mine.yaml: unknown key kv.pagesize (did you mean kv.page_size?)"),
        ("cuda_graph:\n  mode: off", None),
    ],
)
def test_a_preset_is_named_with_its_mistake(preset: str, said: str | None, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{preset}\n")
    overrides = ["experiment=mine", f"hydra.searchpath=[file://{tmp_path}]"]
    if said is None:
        assert composed(*overrides).cuda_graph.mode is GraphMode.off
        return
    with pytest.raises((HydraException, OmegaConfBaseException, ValueError)) as caught:
        composed(*overrides)
    assert said in explain(caught.value)


def test_question_marks_are_a_prompt() -> None:
    assert load_config(composed("workload.prompt='???'")).workload.prompt == "???"


def test_a_preset_that_is_no_yaml_is_one_line_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("workload:\n  batch_size 1\n  steps: 2\n")
    with pytest.raises(MarkedYAMLError) as error, (tmp_path / "x.yaml").open() as file:
        yaml.safe_load(file)
    line = explain(error.value)
    assert (
        line
        == f"{tmp_path / 'x.yaml'}, line 3, column 8: this is no YAML: mapping values are not allowed here"
    )
