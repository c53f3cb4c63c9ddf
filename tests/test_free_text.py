"""A prompt as it is typed in a shell reaches the config, character by character."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from fa_research.config.free_text import quote_free_text

TEXTS = (
    "def main(",
    "a, b",
    "it's",
    'say "so"',
    "tail ",
    " head",
    "back\\",
    "\\'",
    "{a: 1",
    "[1]",
    "1",
    "true",
    "$x",
    "a=b",
    "#",
)


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_is_a_text(text: str) -> None:
    (argument,) = quote_free_text([f"workload.prompt={text}"])
    override = OverridesParser.create().parse_override(argument)
    assert override.key_or_group == "workload.prompt" and override.value() == text


@pytest.mark.parametrize("argument", [
    "workload.prompt=null", "workload.prompt=", "workload.prompt='a, b'", 'workload.prompt="a"', "workload.prompt",
    "workload.generate=2", "kv.page_size=1,16", "--cfg",
])  # fmt: skip
def test_what_is_left_alone(argument: str) -> None:
    assert quote_free_text([argument]) == [argument]


def test_a_sweep_over_prompts() -> None:
    arguments = ["-m", "workload.prompt=a,b"]
    assert quote_free_text(arguments) == arguments
