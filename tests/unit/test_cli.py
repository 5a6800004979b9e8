"""The command line as a user meets it: real processes, exit codes, JSON."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hadal.cli.examples import commands, examples
from hadal.cli.idle_threads import SPIN_COUNT
from hadal.cli.main import app

HADAL = Path(sys.executable).with_name("hadal")


def run(*arguments, cwd=None):
    return subprocess.run([HADAL, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


def test_cost_table_states_its_convention():
    result = run("cost", "--model", "v4-pro", "--context", "1M")
    assert result.returncode == 0, result.stderr
    for part in ("1,048,576", "1,573.00B", "48.85B", "145,116", "5,031.44 B", "10.48%", "2.02%"):
        assert part in result.stdout
    assert "BF16 x2" in result.stdout


def test_cost_json_is_one_object_a_model():
    result = run("cost", "-m", "v4-flash", "-m", "v3.2", "--context", "1e6", "--json")
    flash, v32 = (json.loads(line) for line in result.stdout.splitlines())
    assert flash["ratios"]["flops_of_v3.2"] == pytest.approx(0.1017, abs=1e-4)
    assert v32["kv_bytes_per_token"] == 48_068
    assert flash["context"] == 10**6
    assert flash["convention_text"]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_cost_plot(suffix, tmp_path):
    file = tmp_path / f"figure.{suffix}"
    result = run("cost", "--plot", file)
    assert result.returncode == 0, result.stderr
    assert file.read_bytes()[:4] in (b"\x89PNG", b"<?xm")
    refused = run("cost", "--plot", tmp_path / "figure.nonsense")
    assert refused.returncode == 2
    assert "cannot write the plot" in refused.stderr


def test_cost_without_torch_installed():
    """The base install must be enough to plan."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from hadal.cli.main import app\n"
        "app(['cost', '--model', 'v4-flash', '--json'], exit_on_error=False)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert '"num_tensors": 69187' in result.stdout, result.stderr


def test_what_needs_torch_says_so():
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['hadal', 'chat', 'nano']\n"
        "from hadal.cli.main import main\nmain()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert "hint: pip install 'hadal[engine]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_checkpoint_commands(tmp_path):
    made = run("checkpoint", "make", tmp_path / "nano", "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["experts"] == "fp4"
    converted = run(
        "checkpoint",
        "convert",
        tmp_path / "nano",
        tmp_path / "hf",
        "--layout",
        "huggingface",
        "--json",
    )
    assert json.loads(converted.stdout)["tensors"] == json.loads(made.stdout)["tensors"]
    shown = run("checkpoint", "inspect", tmp_path / "hf", "--tensors")
    assert "layers.1.attn.indexer.weights_proj.weight: bfloat16 [8, 128]" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["cost", "--model", "gpt"], 2, "hint: give one of"),
        (["cost", "--context", "12x"], 2, "expected a token count"),
        (["cost", "--context", "1e400"], 2, "expected at most"),
        (["cost", "--model", "x[/foo]"], 2, "unknown model 'x[/foo]'"),
        (["cost", "--model", "m" * 5000], 2, "unknown model"),
        (["checkpoint", "make", "x", "--seed", "9" * 23], 2, "seed: expected"),
        (["checkpoint", "inspect", "nowhere"], 3, "no checkpoint at nowhere"),
        (["checkpoint", "inspect", "x[/foo]"], 3, "no checkpoint at x[/foo]"),
        (["checkpoint", "convert", "nowhere", "there"], 3, "no checkpoint"),
    ],
)
def test_errors_say_what_to_do(arguments, code, message, tmp_path):
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == code
    assert message in result.stderr + result.stdout
    assert "Traceback" not in result.stderr


def test_names_with_brackets(tmp_path):
    """They are markup to the display library."""
    target = tmp_path / "x[" / "foo]"
    assert run("checkpoint", "make", target).returncode == 0
    result = run("checkpoint", "inspect", target, "--tensors")
    assert result.returncode == 0
    assert "foo]" in result.stdout


def test_reader_of_the_pipe_leaves():
    command = f"{HADAL} checkpoint --help | true; {HADAL} cost -m v4-pro -m v4-flash | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "1,048,576" in result.stdout
    assert result.stderr == ""


def test_full_output():
    with Path("/dev/full").open("w") as full:
        result = subprocess.run([HADAL, "cost", "--json"], stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 3
    assert b"Traceback" not in result.stderr


def test_help_ends_with_the_examples():
    for verb, start in (("cost", "hadal cost --model v4-pro"), ("box rm", "hadal box rm --all")):
        result = run(*verb.split(), "--help")
        assert result.returncode == 0
        assert start in result.stdout.split("Examples")[1]


COMMANDS = [pytest.param(command, id=" ".join(path)) for path, command in commands(app)]


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_commands_that_are_understood(command):
    shown = examples(command).split("\n\n")
    for example in shown:
        lines = example.splitlines()
        assert max(map(len, lines)) <= 78, "wider than a terminal"
        assert all(line.endswith("\\") for line in lines[:-1])
        words = shlex.split(example.replace("\\\n", ""))
        words = words[words.index("hadal") + 1 :]
        end = next((n for n, word in enumerate(words) if word in ("|", ">", "&&")), len(words))
        app.parse_args(words[:end], exit_on_error=False)


def test_errors_do_not_steer_the_terminal(tmp_path):
    result = run("checkpoint", "inspect", "no\x1b[2J", cwd=tmp_path)
    assert r"no checkpoint at no\x1b[2J" in result.stderr


def test_modes_of_the_report(tmp_path):
    chat = tmp_path / "chat.json"
    chat.write_text('[{"role": "user", "content": "hi"}]')

    def encoded(*options):
        return run("encode", chat, "-g", "v4-0731", *options).stdout

    assert encoded("--mode", "non-think") == encoded("--mode", "chat")
    assert encoded("--mode", "think-high") == encoded("--effort", "high")
    assert encoded("--mode", "think-max") == encoded("--effort", "max")
    assert len({encoded("--mode", mode) for mode in ("chat", "think-high", "think-max")}) == 3
    twice = run("encode", chat, "-g", "v4-0731", "--mode", "think-max", "--effort", "low")
    assert twice.returncode == 2
    assert "hint: --mode thinking --effort low" in twice.stderr


@pytest.mark.parametrize(
    ("verb", "given", "count"),
    [
        (("serve", "nano", "--max-num-seqs", "0"), {}, str(SPIN_COUNT)),
        (("serve", "nano", "--max-num-seqs", "0"), {"GOMP_SPINCOUNT": "77"}, "77"),
        (("bench", "cache", "--tokens", "128"), {}, "300000"),
    ],
)
def test_threads_without_work_sleep_soon(verb, given, count):
    """As libgomp itself says, which torch loads."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    environment = kept | {"OMP_DISPLAY_ENV": "verbose"} | given
    done = subprocess.run([HADAL, *verb], env=environment, capture_output=True, text=True)
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr) == [count], done.stderr
