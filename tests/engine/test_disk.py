"""State on disk: exact after a restart, and harmless however it is damaged (issue: lines 1 and 4)."""

import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from hadal.engine import LLM, SamplingParams
from hadal.engine.disk_store import DiskStore
from hadal.errors import StorageError
from tests.engine.fixtures import cached_reference, model_of, prompts

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
[PROMPT] = prompts(1, 900, 900, seed=11)


def llm(path, **settings):
    return LLM(model_of("small_stack"), max_model_len=2048, disk_path=path, **settings)


def run_once(path, **settings):
    engine = llm(path, **settings)
    [done] = engine.generate([PROMPT], GREEDY)
    engine.engine.close()
    return engine, done


def expected():
    return cached_reference(model_of("small_stack"), PROMPT, 8)


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("policy", ["all", "periodic", "none"])
def test_after_a_restart(tmp_path, policy, drafts):
    settings = {"window_policy": policy, "num_speculative_tokens": drafts}
    run_once(tmp_path, **settings)
    _, warm = run_once(tmp_path, **settings)
    assert list(warm.token_ids) == expected()
    assert warm.prefix.from_disk == 896
    assert warm.prefix.computed == 4
    window_and_layers = 128  # 16 tokens by up to five layers, in whole blocks
    assert warm.prefix.replayed == (window_and_layers if policy == "none" else 0)


def test_restored_state_is_what_was_written(tmp_path):
    first, _ = run_once(tmp_path, window_policy="all")
    written = {
        key: [t.clone() for t in c.tensors()] for key, c in first.engine.cache._checkpoints.items()
    }
    assert len(written) == 7
    second = llm(tmp_path, window_policy="all")
    for key, tensors in written.items():
        restored = second.engine.cache._find_checkpoint(key, 128)
        assert all(torch.equal(a, b) for a, b in zip(tensors, restored.tensors(), strict=True))
    second.engine.close()


def test_after_eviction_from_memory(tmp_path):
    engine = llm(tmp_path)
    engine.generate([PROMPT], GREEDY)
    engine.engine.cache.clear()
    [again] = engine.generate([PROMPT], GREEDY)
    assert list(again.token_ids) == expected()
    assert (again.prefix.hit, again.prefix.from_disk) == (896, 896)


def test_another_model_or_format_hits_nothing(tmp_path):
    run_once(tmp_path)
    _, other = run_once(tmp_path, weight_version="2")
    assert other.prefix.hit == 0
    engine = LLM(model_of("small_stack", seed=1), max_model_len=2048, disk_path=tmp_path)
    [done] = engine.generate([PROMPT], GREEDY)
    assert done.prefix.hit == 0
    assert list(done.token_ids) == cached_reference(model_of("small_stack", 1), PROMPT, 8)


def damage(file: Path, how: str, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    if how == "truncated":
        del data[rng.randrange(len(data)) :]
    elif how == "flipped":
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "zeroed":
        at = rng.randrange(len(data))
        data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    elif how == "garbage":
        data = bytearray(rng.randbytes(5000))
    file.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "flipped", "zeroed", "garbage"])
@pytest.mark.parametrize("seed", range(5))
def test_damaged_files_are_computed_again(tmp_path, how, seed):
    run_once(tmp_path, window_policy="all")
    rng = random.Random(seed)
    for file in tmp_path.glob("segment-*"):
        damage(file, how, rng)
    engine, done = run_once(tmp_path, window_policy="all")
    assert list(done.token_ids) == expected()
    assert done.prefix.hit + done.prefix.replayed + done.prefix.computed == 900
    assert engine.engine.cache.pool.use().held == 0
    _, third = run_once(tmp_path, window_policy="all")  # what was computed again is there again
    assert third.prefix.computed == 4


def test_every_flipped_byte_of_a_record_is_noticed(tmp_path):
    store = DiskStore(tmp_path, 1 << 20)
    store.put(b"B", b"k" * 16, [torch.arange(4)])
    store.close()
    [file] = tmp_path.glob("segment-*")
    clean = file.read_bytes()
    for at in range(len(clean)):
        file.write_bytes(clean[:at] + bytes([clean[at] ^ 16]) + clean[at + 1 :])
        damaged = DiskStore(tmp_path, 1 << 20)
        assert damaged.get(b"B", b"k" * 16) is None, at
        assert damaged.use().damaged == 1
        damaged.close()


def test_a_full_folder_drops_its_oldest_segment(tmp_path):
    store = DiskStore(tmp_path, 64_000)
    keys = [bytes([i]) * 16 for i in range(200)]
    for key in keys:
        store.put(b"B", key, [torch.full((100,), key[0], dtype=torch.float64)])
        assert store.use().num_bytes <= 64_000
    assert store.get(b"B", keys[0]) is None
    [kept] = store.get(b"B", keys[-1])
    assert torch.equal(kept, torch.full((100,), 199.0, dtype=torch.float64))
    store.put(b"B", b"x" * 16, [torch.zeros(100_000)])
    assert store.use().failed_writes == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_costs_the_cache_and_nothing_else(tmp_path):
    """Every write fails as on a full disk: the segments are links to the device that is always full."""
    for number in range(4):
        (tmp_path / f"segment-{number:08d}.hdl").symlink_to("/dev/full")
    store = DiskStore(tmp_path, 1 << 20)
    store._writer = os.open("/dev/full", os.O_WRONLY)
    store._sizes[9] = 0
    store.put(b"B", b"k" * 16, [torch.arange(4)])
    assert store.use().failed_writes == 1
    assert "space" in store.use().error
    assert store.get(b"B", b"k" * 16) is None
    store.put(b"B", b"k" * 16, [torch.arange(4)])  # a new segment: there is room again
    [kept] = store.get(b"B", b"k" * 16)
    assert torch.equal(kept, torch.arange(4))


def test_one_process_at_a_time(tmp_path):
    engine = llm(tmp_path)
    with pytest.raises(StorageError, match="another engine"):
        llm(tmp_path)
    engine.engine.close()
    llm(tmp_path).engine.close()


KILLED = """
import sys
sys.path.insert(0, {root!r})
from tests.engine.test_disk import GREEDY, llm
from tests.engine.fixtures import prompts
engine = llm({path!r}, window_policy="all")
print("ready", flush=True)
for seed in range(10_000):
    engine.generate(prompts(1, 500, 900, seed=11 if seed % 2 == 0 else seed), GREEDY)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_while_writing(tmp_path, seed):
    script = textwrap.dedent(KILLED.format(root=str(Path(__file__).parents[2]), path=str(tmp_path)))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    try:
        process.wait(timeout=random.Random(seed).uniform(0.05, 3))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    process.stdout.close()
    _, done = run_once(tmp_path, window_policy="all")
    assert list(done.token_ids) == expected()
