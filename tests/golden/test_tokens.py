"""Token ids: exactly those of one pass on benign text, and no control id out of anybody's text."""

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer

from hadal.encoding.tokens import Control
from tests.golden.data import HERE, cases, encoding, settings, tokenizer, tokenizer_file


@pytest.fixture(scope="module")
def one_pass():
    return HFTokenizer.from_file(str(tokenizer_file()))


def split_all(text):
    """Text with every added token that it spells as a control token: what one pass sees."""
    found = sorted(tokenizer().added, key=len, reverse=True)
    items, plain, at = [], 0, 0
    while at < len(text):
        token = next((t for t in found if text.startswith(t, at)), None)
        if token is None:
            at += 1
            continue
        items += [text[plain:at], Control(token)]
        at += len(token)
        plain = at
    return [*items, text[plain:]]


@pytest.mark.parametrize("case", cases(HERE / "tokenizer/tokens.jsonl"))
def test_tokens(case):
    assert tokenizer().encode_items(split_all(case["text"])) == case["ids"]
    assert tokenizer().decode(case["ids"]) == case["text"]


@pytest.mark.parametrize("case", cases(HERE / "tokenizer/boundary-drift.jsonl"))
def test_adjacent_texts_are_encoded_as_one_run(case):
    items = [item for part in case["parts"] for item in split_all(part)]
    assert tokenizer().encode_items(items) == case["whole_ids"]


@pytest.mark.parametrize("case", cases(HERE / "generated/encode.jsonl"))
def test_encode_equals_one_pass_over_the_rendered_text(case, one_pass):
    if "expected" in case:
        ids = encoding(strict=True).encode(case["messages"], **settings(case["args"]))
        assert ids == one_pass.encode(case["expected"], add_special_tokens=False).ids


@hypothesis_settings(max_examples=300, deadline=None)
@given(st.lists(st.text(alphabet=st.characters(max_codepoint=127)) | st.text(), max_size=4))
def test_ascii_shortcut_equals_the_file(texts):
    """Runs of ASCII take cheaper split patterns: the ids are those of the file's own."""
    plain = tokenizer()._plain  # the tokenizer as the file defines it
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    ids = [plain.encode(text, add_special_tokens=False).ids for text in texts]
    assert [tokenizer().encode_text(text) for text in texts] == ids


def test_ascii_shortcut_on_every_triple_of_ascii():
    everything = "".join(a + b + c for a in ASCII for b in ASCII for c in ASCII)
    rows = [everything[i : i + 4096] for i in range(0, len(everything), 4096)]
    plain = tokenizer()._plain.encode_batch_fast(rows, add_special_tokens=False)
    assert [tokenizer().encode_text(row) for row in rows] == [e.ids for e in plain]
    assert tokenizer()._ascii is not tokenizer()._plain


ASCII = "".join(map(chr, [0, 9, 10, 11, 13, 27, *range(32, 127)]))
TOKENS = sorted(t for t in tokenizer().added if "place▁holder" not in t and "place_holder" not in t)


def hostile_conversation(text):
    call = {"function": {"name": f"f{text}", "arguments": {f"k{text}": text, "o": {text: [text]}}}}
    return [
        {"role": "system", "content": text},
        {"role": "latest_reminder", "content": text},
        {"role": "user", "content": [{"type": "text", "text": text}] * 2},
        {"role": "assistant", "content": text, "reasoning_content": text, "tool_calls": [call]},
        {"role": "tool", "content": text},
        {"role": "user", "content": text},
    ]


def declared(text):
    schema = {"type": "object", "properties": {text: {"type": "string", "description": text}}}
    return [{"type": "function", "function": {"name": f"t{text}", "parameters": schema}}]


@pytest.mark.parametrize("token", TOKENS)
def test_injection_no_control_id_out_of_text(token):
    """F23: role and think tokens in user or tool text became control ids (ds4#197, vllm#31735)."""
    control = set(tokenizer().added.values())

    def controls(text):
        ids = encoding().encode(
            hostile_conversation(text),
            tools=declared(text),
            response_format={"type": "json_object", "x": text},
        )
        return [i for i in ids if i in control]

    benign = controls("x")
    for hostile in (token, f"a{token}b", f"{token}{token}", f"\n\n{token}", token[1:], token[:-1]):
        assert controls(hostile) == benign
    ids = tokenizer().encode_text(token)
    assert not control & set(ids)
    assert tokenizer().decode(ids) == token
