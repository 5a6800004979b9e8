"""hadal encode and decode in a shell pipe."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden.data import tokenizer_file

HADAL = Path(sys.executable).with_name("hadal")
ASK = json.dumps([{"role": "user", "content": "Hello"}])


def hadal(*arguments, given=""):
    return subprocess.run([HADAL, *arguments], input=given, capture_output=True, text=True)


def test_encode_prints_the_exact_text():
    found = hadal("encode", "-g", "v4", given=ASK)
    assert found.stdout == "<｜begin▁of▁sentence｜><｜User｜>Hello<｜Assistant｜><think>"
    assert (found.returncode, found.stderr) == (0, "")


def test_ids_and_back():
    tokenizer = str(tokenizer_file())
    ids = hadal("encode", "-g", "v4", "--tokenizer", tokenizer, "--ids", given=ASK).stdout
    assert ids.split() == ["0", "128803", "19923", "128804", "128821"]
    back = hadal("decode", "-g", "v4", "--tokenizer", tokenizer, "--ids", "--text", given=ids)
    assert back.stdout == "<｜begin▁of▁sentence｜><｜User｜>Hello<｜Assistant｜><think>"


def test_json_says_where_the_completion_begins():
    whole = json.dumps({"messages": json.loads(ASK), "tools": []})
    found = json.loads(
        hadal("encode", "-g", "v4.1", "--mode", "chat", "--json", given=whole).stdout
    )
    assert found["start"] == "content"


def test_decode_prints_a_message_and_fails_on_a_malformed_one():
    good = hadal("decode", "-g", "v4", given="easy</think>4<｜end▁of▁sentence｜>")
    assert json.loads(good.stdout)["content"] == "4"
    assert good.returncode == 0
    bad = hadal("decode", "-g", "v4", given="hm<｜end▁of▁sentence｜>")
    assert json.loads(bad.stdout)["termination"] == "malformed"
    assert bad.returncode == 1


@pytest.mark.parametrize(
    ("command", "given", "told"),
    [
        (["encode", "-g", "v4"], "{", "not JSON"),
        (["encode", "-g", "v4"], "{}", "expected a list of messages"),
        (
            ["encode", "-g", "v4"],
            '{"messages": [], "temperature": 1}',
            "unknown fields: temperature",
        ),
        (["encode", "-g", "v4"], '[{"role": "user", "x": 1}]', "messages[0].x"),
        (["encode"], ASK, "generation"),
        (["encode", "-g", "v4", "--ids"], ASK, "need a tokenizer"),
        (["encode", "-g", "v4", "--effort", "low"], ASK, "unknown reasoning effort"),
        (["encode", "/no/such/file", "-g", "v4"], "", "cannot read"),
        (["decode", "-g", "v4", "--ids"], "one two", "expected token ids"),
        (["decode", "-g", "v4", "--strict"], "x", "malformed completion"),
    ],
)
def test_wrong_input_is_told_without_a_traceback(command, given, told):
    found = hadal(*command, given=given)
    assert found.returncode in (2, 3)
    assert told in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--text"], "--text needs --ids"),
        (["--tools", "/nowhere.json"], "cannot read /nowhere.json"),
        (["--tools", "{tmp}/broken.json"], "the tools are not JSON"),
        (["--tools", "{tmp}/object.json"], "expected a list of tools"),
    ],
)
def test_decode_refuses_what_does_not_fit(tmp_path, arguments, says):
    (tmp_path / "broken.json").write_text("[")
    (tmp_path / "object.json").write_text("{}")
    arguments = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    result = hadal("decode", "-g", "v4", *arguments, given="x")
    assert result.returncode == 2
    assert says in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
