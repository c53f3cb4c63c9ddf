"""What rows of `workload.level=attention` say of the attention path inside a model's decode step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fa_research.compare.keys import ABSENT, text_of, within
from fa_research.compare.reading import Record

_PARTS = ("metadata_us", "kv_write_us", "attention_us")
# What decides the time of the attention path, besides context, batch size and layers. The rest of a config does not.
_DECIDE = (
    *(
        "backend",
        "kv.page_size",
        "kv.dtype",
        "kv.churn",
        "measure.l2",
        "workload.name",
        "workload.length_spread",
    ),
    *(
        "model.num_heads",
        "model.num_kv_heads",
        "model.head_dim",
        "model.mask",
        "model.local",
        "model.softcap",
    ),
    *("model.sink", "model.attention_scale"),
)
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_MOST_NAMED = 4
Found = tuple[float, str]


def path_us(record: Record, layers: int | None = None) -> float | None:
    """The attention path of `layers` layers, or of those that ran: metadata once, KV write and attention of each.

    It is the row's own step, which is this path and nothing else, launched as it runs in a model. Rows without a step
    have its parts, where metadata is that of a call by itself, the host's time in it. None: neither was timed."""
    metrics = record.row.metrics
    metadata, write, attention = (_number(metrics.get(name)) for name in _PARTS)
    parts = None if write is None or attention is None else write + attention
    if (step := _number(metrics.get("decode_step_us"))) is None:
        if parts is None or metadata is None:
            return None
        step = parts + metadata
    once = _number(metrics.get("decode_step_ledger_metadata_us"))
    if once is None:
        once = 0.0 if parts is None else max(step - parts, 0.0)
    if record.config.get("backend.metadata") == "per_layer":
        once = 0.0
    ran = layers_run(record)
    return once + (step - once) * (layers or ran) / ran


def layers_run(record: Record) -> int:
    """How many layers the row's step had."""
    return int(record.config.get("workload.num_layers") or record.config["model.num_layers"])


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def key_of(record: Record) -> dict[str, Any]:
    """What has to be equal. What `auto` came to counts, where the row says it."""
    known = record.row.environment
    key = {k: v for k, v in record.config.items() if any(within(k, name) for name in _DECIDE)}
    ran = {"backend.name": "backend", "cuda_graph.mode": "cuda_graph_mode", "model.dtype": "dtype"}
    return key | {name: known.get(fact) or record.config.get(name) for name, fact in ran.items()}


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [key for key in a | b if repr(a.get(key, ABSENT)) != repr(b.get(key, ABSENT))]


class KernelRows:
    """Rows of the attention path, found by what they have in common with a model's row."""

    def __init__(self, records: Sequence[Record], across: bool) -> None:
        self.records, self.across = list(records), across

    def attention_us(self, model: Record) -> Found | str:
        """Microseconds of the attention path in this row's step and where they are from, or why they are not known."""
        key = key_of(model)
        batch, context = model.config.get("workload.batch_size"), model.config["workload.context_len"]
        alike = [record for record in self.records if not differing(key, key_of(record))]
        if not alike:
            return self._nearest(key)
        if not self.across:
            here = [record for record in alike if record.machine == model.machine]
            if not here:
                return _other_machine(alike[0], model)
            alike = here
        alike = [record for record in alike if record.config.get("workload.batch_size") == batch]
        if not alike:
            return f"no kernel row has workload.batch_size={text_of(batch)}"
        timed: dict[int, tuple[Record, float]] = {}
        wanted = model.config[
            "model.num_layers"
        ]  # rows of all layers before those that are scaled, then the latest
        for record in sorted(alike, key=lambda r: (layers_run(r) == wanted, r.row.finished)):
            if (time := _over_layers(record, model)) is None:
                return "its layers differ, and the kernel rows ran some of them only (workload.num_layers)"
            timed[record.config["workload.context_len"]] = (record, time)
        return _at(timed, context, model)

    def _nearest(self, key: dict[str, Any]) -> str:
        """What keeps the closest kernel row apart."""
        record = min(self.records, key=lambda record: len(differing(key, key_of(record))))
        other = key_of(record)
        names = differing(key, other)
        said = ", ".join(
            f"{name} ({text_of(key.get(name, ABSENT))} and {text_of(other.get(name, ABSENT))})"
            for name in names[:_MOST_NAMED]
        )
        more = f" and {len(names) - _MOST_NAMED} more keys" if len(names) > _MOST_NAMED else ""
        return f"the closest kernel row, {record.place}, differs in {said}{more}"


def _other_machine(kernel: Record, model: Record) -> str:
    facts = [k for k in model.machine if kernel.machine.get(k) != model.machine[k]]
    said = ", ".join(f"{k} ({kernel.machine.get(k, ABSENT)} and {model.machine[k]})" for k in facts[:3])
    return f"its kernel rows are of another machine or version: {said or 'facts are missing'}; --across takes them"


def _over_layers(kernel: Record, model: Record) -> float | None:
    """The path's time over all layers of the model; None where the layers that ran do not stand for the rest."""
    ran, layers = layers_run(kernel), model.config["model.num_layers"]
    pattern = len(model.config.get("model.local.pattern") or []) or 1
    if ran != layers and (ran % pattern or layers % pattern):
        return None
    return path_us(kernel, layers)


def _at(timed: dict[int, tuple[Record, float]], context: int, model: Record) -> Found | str:
    """As measured, or between the nearest two contexts in proportion to the bytes of keys and values."""
    if context in timed:
        record, time = timed[context]
        return time, record.place
    below, above = [c for c in timed if c < context], [c for c in timed if c > context]
    if not below or not above:
        known = ", ".join(map(str, sorted(timed)))
        return f"workload.context_len={context} does not lie between those of the kernel rows ({known})"
    low, high = max(below), min(above)
    seen = {c: keys_seen(model.config, c) for c in (low, context, high)}
    share = (seen[context] - seen[low]) / (seen[high] - seen[low]) if seen[high] > seen[low] else 0.0
    time = timed[low][1] + (timed[high][1] - timed[low][1]) * share
    return time, f"between {timed[low][0].place} and {timed[high][0].place}"


def keys_seen(config: dict[str, Any], context: int) -> float:
    """Keys that a new token sees, over all layers: what the bytes of a decode step's attention are in proportion to."""

    def seen(mask: str) -> int:
        name, size = config.get(f"{mask}.name"), config.get(f"{mask}.size")
        if not size:
            return context
        if name == "chunked":
            return (context - 1) % size + 1
        first = config.get(f"{mask}.options.sink_tokens", 4) if name == "streaming" else 0
        return min(context, first + size)

    pattern = config.get("model.local.pattern") or [False]
    kinds = (pattern[layer % len(pattern)] for layer in range(config["model.num_layers"]))
    return float(sum(seen("model.local.mask" if local else "model.mask") for local in kinds))


def rest_bytes(record: Record) -> float | None:
    """Bytes that a decode step moves besides attention: weights read once (of the embedding table a row a token, of a
    mixture the experts that are expected to be hit), logits written and read. None where the row has no weights."""
    config, weights = record.config, record.row.metrics.get("model_weight_bytes")
    if not isinstance(weights, int | float) or weights <= 0:
        return None
    batch, vocab = config.get("workload.batch_size", 1), config["model.vocab_size"]
    item = _ITEM_BYTES.get(str(record.row.environment.get("dtype") or config.get("model.dtype")), 2)
    table = 0 if config.get("model.tie_word_embeddings") else vocab * config["model.hidden_size"] * item
    return weights - table - _idle_bytes(config, batch, item) + 2 * batch * vocab * item


def _idle_bytes(config: dict[str, Any], batch: int, item: int) -> float:
    """Weights of experts that no token takes: each is left out by a token with 1 - k/N, tokens drawing alike."""
    experts = config.get("model.moe.num_experts") or 0
    if not experts:
        return 0.0
    hidden, wide = config["model.hidden_size"], config["model.intermediate_size"]
    biases = 2 * wide + hidden if config.get("model.moe.bias") else 0
    every = config["model.num_layers"] * experts * (3 * hidden * wide + biases) * item
    return float(every * (1 - config["model.moe.experts_per_token"] / experts) ** batch)
