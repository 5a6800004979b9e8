"""What is kept of the options of a run: all that it needs to go on, and nothing that may be secret."""

import pytest

from hadal.cli.agent_options import AgentOptions
from hadal.cli.box_options import BoxOptions
from hadal.cli.run_settings import RunSettings, model_identity
from hadal.cli.serve import ServedOptions
from hadal.errors import ConfigError

SECRET = "s3cret"
BEGUN = RunSettings(
    model=f"http://name:{SECRET}@gpu-box:8000/v1?key={SECRET}", tokenizer="tokenizer.json",
    agent=AgentOptions(mcp=(f"files=http://localhost:1/{SECRET}",), seed=3, temperature=0.5),
    box=BoxOptions(env=(f"TOKEN={SECRET}", "A=b"), mount=("./data:/data:rw", "/etc:/etc")),
)  # fmt: skip


def test_nothing_that_may_be_secret_is_written():
    written = BEGUN.written()
    assert SECRET not in repr(written)
    assert written["model"] == "http://gpu-box:8000/v1"
    assert written["agent"]["mcp"] == ["files"]
    assert written["box"]["env"] == ["TOKEN", "A"]
    assert SECRET not in model_identity(BEGUN.model)


def test_it_means_the_same_in_another_directory(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    written = BEGUN.written()
    assert written["box"]["mount"] == [f"{tmp_path}/data:/data:rw", "/etc:/etc"]
    assert written["tokenizer"] == str(tmp_path / "tokenizer.json")
    monkeypatch.chdir("/")
    again = RunSettings(agent=AgentOptions(mcp=BEGUN.agent.mcp)).resumed(written, has_box=True)
    assert again.written() | {"box": {}} == written | {"box": {}}
    assert again.box.mount == tuple(written["box"]["mount"])
    assert again.agent.temperature == 0.5


def test_values_that_are_not_kept_are_given_again():
    written = BEGUN.written()
    with pytest.raises(ConfigError, match="begun with --mcp files"):
        RunSettings().resumed(written, has_box=True)
    with_servers = RunSettings(agent=AgentOptions(mcp=BEGUN.agent.mcp))
    with pytest.raises(ConfigError, match="begun with --env TOKEN, A"):
        with_servers.resumed(written, has_box=False)
    whole = RunSettings(
        model=BEGUN.model, agent=with_servers.agent, box=BoxOptions(env=BEGUN.box.env)
    ).resumed(written, has_box=False)
    assert (whole.model, whole.agent.mcp, whole.box.env) == (BEGUN.model, BEGUN.agent.mcp, BEGUN.box.env)  # fmt: skip


def test_what_is_said_anew_must_be_the_same():
    written = RunSettings(agent=AgentOptions(seed=3)).written()
    assert RunSettings(agent=AgentOptions(seed=3)).resumed(written, has_box=True).agent.seed == 3
    with pytest.raises(ConfigError, match="another seed, another memory"):
        RunSettings(agent=AgentOptions(seed=4), box=BoxOptions(memory=1 << 30)).resumed(
            written, has_box=True
        )


def test_runs_of_before_an_option_go_on():
    written = RunSettings().written()
    del written["served"], written["agent"]["logprobs"]
    assert RunSettings().resumed(written, has_box=True) == RunSettings()
    with pytest.raises(ConfigError, match="another upstream_model"):
        RunSettings(served=ServedOptions(upstream_model="v4")).resumed(written, has_box=True)


def test_two_commands_that_ask_for_the_same(tmp_path):
    (tmp_path / "weights").write_bytes(b"1")
    first = RunSettings(model=str(tmp_path)).command("x")
    assert RunSettings(model=str(tmp_path)).command("x") == first
    assert RunSettings(model=str(tmp_path)).command("y") != first
    assert RunSettings(model=str(tmp_path), image="other").command("x") != first
    (tmp_path / "weights").write_bytes(b"2")
    assert RunSettings(model=str(tmp_path)).command("x") != first
