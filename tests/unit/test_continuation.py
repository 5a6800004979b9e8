"""Ids that the model wrote are kept, and only what is new is encoded."""

import pytest

from hadal.chat import AssistantMessage, ToolMessage
from hadal.errors import ConfigError, EncodingError
from tests.golden.data import encoding

TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
ASK = [{"role": "system", "content": "S"}, {"role": "user", "content": "Look."}]
CALL = (
    'I look.</think>Now.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n'
    "</｜DSML｜tool_calls>"
)
ENC = encoding()


def model_ids(text):
    """What a model might write: one token per character, where the tokenizer would use few."""
    ids = []
    for piece in (
        text.replace("</think>", "\0</think>\0").replace("｜DSML｜", "\0｜DSML｜\0").split("\0")
    ):
        control = ENC.tokenizer.added.get(piece)
        ids += [control] if control else [i for c in piece for i in ENC.tokenizer.encode_text(c)]
    return ids


@pytest.mark.parametrize("eos", [[], [1]])
def test_an_agent_loop_never_encodes_the_models_text_again(eos):
    messages, ids = list(ASK), ENC.encode(ASK, tools=[TOOL])
    for _ in range(3):
        written = model_ids(CALL) + eos
        ids += written
        message = ENC.parse(written, tools=[TOOL], finish_reason="stop")
        assert len(message.tool_calls) == 1
        messages.append(message)
        results = [ToolMessage("done.", message.tool_calls[0].id)]
        new = ENC.encode_continuation(ids, messages, results, tools=[TOOL])
        ids, messages = ids + new, messages + results
    assert ENC.decode(ids) == ENC.render(messages, tools=[TOOL])
    assert ids != ENC.encode(messages, tools=[TOOL])


def test_with_canonical_ids_it_equals_encoding_everything():
    answered = [*ASK, {"role": "assistant", "content": "a.", "reasoning_content": "r"}]
    ids = ENC.encode(answered, tools=[TOOL])
    more = [{"role": "user", "content": "\n\nand now?"}]
    new = ENC.encode_continuation(ids, answered, more, tools=[TOOL])
    assert ids + new == ENC.encode([*answered, *more], tools=[TOOL])


def test_a_prefix_that_changes_is_refused():
    answered = [*ASK, AssistantMessage("a", "thought")]
    ids = ENC.encode(answered)
    more = [{"role": "user", "content": "next"}]
    with pytest.raises(EncodingError, match="change the prompt from character"):
        ENC.encode_continuation(ids, answered, more)
    new = ENC.encode_continuation(ids, answered, more, drop_thinking=False)
    assert ENC.decode(ids + new).endswith("<｜User｜>next<｜Assistant｜><think>")


def test_it_follows_a_turn_of_the_assistant():
    with pytest.raises(EncodingError, match="last role"):
        ENC.encode_continuation([0], ASK, [{"role": "user", "content": "x"}])


def test_ids_need_a_tokenizer():
    from hadal.encoding import Encoding

    with pytest.raises(ConfigError, match="none was loaded"):
        Encoding.load("v4").encode(ASK)
    with pytest.raises(ConfigError, match="no tokenizer"):
        Encoding.load("v4").parse([1, 2])


def test_the_generation_is_read_from_the_checkpoint_and_never_run(tmp_path):
    from hadal.encoding import detect_generation
    from hadal.errors import CheckpointError

    folder = tmp_path / "DeepSeek-V4.1-by-name-only"
    (folder / "encoding").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="found neither"):
        detect_generation(folder)
    file = folder / "encoding" / "encoding_dsv4.py"
    for text, name in (
        ("REASONING_EFFORT_MAX = 'x'\nraise SystemExit", "v4"),
        ("REASONING_EFFORT_PROMPTS: dict = {}\n1/0", "v4-0731"),
    ):
        file.write_text(text)
        assert detect_generation(folder) == name
    file.write_text("nothing = 1")
    with pytest.raises(CheckpointError, match="to assign"):
        detect_generation(folder)
    (folder / "encoding" / "encoding.py").write_text("")
    assert detect_generation(folder) == "v4.1"
