"""Any recorded step can be run again by itself, and comes out the same."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hadal.checkpoint import save
from hadal.engine import LLM, SamplingParams, replay_step
from hadal.errors import StorageError
from tests.engine.fixtures import model_of, prompts


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Requests that share a prefix, get preempted, are drafted for, penalised and cancelled."""
    path = tmp_path_factory.mktemp("log") / "steps.jsonl"
    model = model_of()
    block = LLM(model, max_model_len=512).engine.memory.block_bytes
    llm = LLM(
        model,
        max_model_len=9 * 128,
        cache_bytes=9 * block,
        max_num_batched_tokens=256,
        num_speculative_tokens=2,
        step_log=path,
    )
    asked = prompts(3, 250, 300, seed=4)
    params = SamplingParams(
        max_tokens=250, seed=1, top_p=0.9, repetition_penalty=1.1, ignore_eos=True
    )
    done = llm.generate([asked[0], *asked], [params, replace(params, seed=2), params, params])
    assert sum(c.num_preemptions for c in done) > 0
    llm.engine.add(asked[0], params, request_id="gone")
    llm.engine.step()
    llm.engine.close()
    return path


def test_every_kind_of_step_is_repeated(log):
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"start", "add", "step", "cancel"}
    steps = [line for line in lines if line["kind"] == "step"]
    after = [s["step"] + 1 for s in steps if s["preempted"]]
    chosen = {1, 2, 5, after[0], len(steps) // 2, len(steps) - 1}
    for step in sorted(chosen):
        assert replay_step(log, model_of(), step).equal, step


def test_the_command(log, tmp_path):
    save(model_of(), tmp_path / "model")
    hadal = str(Path(sys.executable).parent / "hadal")
    command = [hadal, "replay", str(log), str(tmp_path / "model"), "--step", "3", "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines
    assert all(line["equal"] for line in lines)


def test_another_model_comes_out_different_or_is_refused(log):
    with pytest.raises(StorageError, match="another model"):
        replay_step(log, model_of("flash_like", 1), 1)
    with pytest.raises(StorageError, match="no step 100000"):
        replay_step(log, model_of(), 100_000)


def test_a_changed_record_is_noticed(log, tmp_path):
    lines = log.read_text().splitlines()
    place, line = next(
        (i, json.loads(text))
        for i, text in enumerate(lines)
        if '"tokens": [' in text and json.loads(text)["work"][0]["tokens"]
    )
    line["work"][0]["tokens"][0] ^= 1
    changed = tmp_path / "changed.jsonl"
    changed.write_text("\n".join([*lines[:place], json.dumps(line), *lines[place + 1 :]]))
    assert not replay_step(changed, model_of(), line["step"]).equal
    changed.write_text("\n".join([*lines[:2], "{", *lines[2:]]))
    with pytest.raises(StorageError, match="line 3"):
        replay_step(changed, model_of(), 1)
    changed.write_text("\n".join(lines)[:-20])  # the last line was being written
    assert replay_step(changed, model_of(), 2).equal
