"""A small run: what is learned from, that it learns, and that it goes on bit for bit."""

import dataclasses
import json

import pytest
import torch

from hadal.chat import AssistantMessage, ToolCall, ToolMessage, UserMessage
from hadal.encoding import Encoding
from hadal.errors import ConfigError, InputError, StorageError
from hadal.model import ModelConfig
from hadal.tools import BashTool
from hadal.train.samples import Conversations
from hadal.train.tokenizer import train_tokenizer
from hadal.train.train_config import TrainConfig
from hadal.train.trainer import STATE, Trainer


def task(name):
    call = ToolCall("bash", json.dumps({"command": f"cat {name}"}), id="1")
    return (
        UserMessage(f"Read {name}."),
        AssistantMessage("", reasoning_content=f"I read {name}.", tool_calls=(call,)),
        ToolMessage("text\n", "1"),
        AssistantMessage("Done.", reasoning_content="That is done."),
    )


@pytest.fixture(scope="module")
def encoding(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(
        [f"Read f{n}.txt. That is done. cat parameter>\n</" for n in range(50)], 320, path
    )
    return Encoding.load("v4", tokenizer=path)


@pytest.fixture(scope="module")
def data(encoding):
    tasks = [task(f"f{n}.txt") for n in range(20)]
    return Conversations(encoding, [BashTool.declare()], tasks, seed=1)


def config(folder, **changes):
    model = dataclasses.replace(ModelConfig.nano(), vocab_size=320, num_hidden_layers=3,
                                compress_ratios=(0, 4, 128, 0), n_routed_experts=4, num_experts_per_tok=2)  # fmt: skip
    settings = {
        "steps": 8,
        "tokens_per_worker": 2048,
        "lengths": ((0.0, 2048),),
        "warmup_steps": 2,
        "workers": 1,
    }
    return TrainConfig(model=model, output=folder, **(settings | changes))


def test_tokenizer(encoding):
    tokenizer = encoding.tokenizer
    for text in ("Read f1.txt. 12", "naïve €\n\tx", "<｜User｜>", ""):
        assert tokenizer.decode(tokenizer.encode_text(text)) == text
    assert not set(tokenizer.encode_text("<｜User｜></think>｜DSML｜")) & set(
        tokenizer.added.values()
    )
    assert tokenizer.encode_text("123") == [i for d in "123" for i in tokenizer.encode_text(d)]


def test_only_what_the_model_says_is_learned(encoding, data):
    batch = data.batch(0, 0, tokens=2048, length=2048)
    assert batch.lengths == [len(batch.ids_T)]
    learned = batch.labels_T[batch.labels_T >= 0]
    said = encoding.decode(learned.tolist())
    for text in said.split("<｜end▁of▁sentence｜>")[:-1]:
        assert text.startswith(("I read f", "That is done.</think>Done."))
    places = (batch.labels_T >= 0).nonzero().flatten()
    assert torch.equal(batch.labels_T[places], batch.ids_T[places + 1])
    prompt = encoding.decode(batch.ids_T[: places[0] + 1].tolist())
    assert prompt.endswith(".<｜Assistant｜><think>")
    assert prompt.count("<｜User｜>") == 1


def test_batches_are_a_function_of_their_place(data):
    one, same = (data.batch(3, 1, tokens=4096, length=2048) for _ in range(2))
    assert torch.equal(one.ids_T, same.ids_T)
    assert len(one.lengths) == 2
    for other in ((3, 0), (4, 1)):
        assert not torch.equal(one.ids_T, data.batch(*other, tokens=4096, length=2048).ids_T)


def test_a_step_has_a_sample_however_long(data):
    assert len(data.batch(0, 0, tokens=512, length=2048).lengths) == 1


def test_no_task_is_cut(encoding, data):
    for length in (data.shortest, 1500, 2048):
        batch = data.batch(length, 0, tokens=4 * length, length=length)
        assert sum(batch.lengths) <= 4 * length
        for sample in batch.ids_T.split(batch.lengths):
            assert len(sample) <= length
            assert encoding.decode(sample.tolist()).endswith("</think>Done.<｜end▁of▁sentence｜>")


@pytest.mark.parametrize(("repeats", "least", "most"), [(700, 35, 75), (100, 0, 12)])
def test_long_samples_hold_long_tasks(encoding, repeats, least, most):
    """Most tasks are short: one long one in 61 is in about half of the samples, if they are long."""
    long = (UserMessage("Read f1.txt. " * repeats), *task("f1.txt")[1:])
    tasks = [*(task(f"f{n}.txt") for n in range(60)), long]
    made = Conversations(encoding, [BashTool.declare()], tasks, seed=1)
    length = made.longest + 100
    samples = [made.batch(step, 0, tokens=length, length=length).ids_T for step in range(100)]
    begun = [
        sample for sample in samples if encoding.decode(sample.tolist()).count("Read f1.txt. " * 9)
    ]
    assert least <= len(begun) < most


def test_tasks_that_do_not_fit_are_left_out_where_that_is_asked(encoding):
    long = (UserMessage("Read f1.txt. " * 700), *task("f1.txt")[1:])
    tasks, tools = [*(task(f"f{n}.txt") for n in range(9)), long], [BashTool.declare()]
    every = Conversations(encoding, tools, tasks, seed=1)
    short = Conversations(encoding, tools, tasks[:-1], seed=1)
    fitting = Conversations(encoding, tools, tasks, seed=1, longest=short.longest)
    assert (fitting.longest, fitting.digest) == (short.longest, short.digest)
    assert every.longest > short.longest
    with pytest.raises(InputError, match="no task"):
        Conversations(encoding, tools, tasks, seed=1, longest=short.shortest - 1)


def test_lengths_that_hold_no_task(data, tmp_path):
    short = data.shortest - 1
    with pytest.raises(ConfigError, match="the shortest sample must hold some task"):
        Trainer(config(tmp_path, tokens_per_worker=short, lengths=((0.0, short),)), data)


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["language"], row["mtp"], row["indexer"], row["norm"]) for row in rows]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_it_learns_and_resumes_bit_for_bit(data, tmp_path, optimizer):
    torch.set_num_threads(1)
    settings = {"optimizer": optimizer, "quantize_from": 0.7, "sparse_from": 0.4}
    whole = Trainer(config(tmp_path, **settings), data)
    whole.run()
    expected = losses(tmp_path)
    assert len(expected) == 8
    assert expected[-1][1] < expected[0][1] / 1.5

    parts = tmp_path / "parts"
    parts.mkdir()
    first = Trainer(config(parts, **settings), data)
    with pytest.raises(KeyboardInterrupt):
        first.run(lambda m: interrupt(first, m["step"], at=5))
    again = Trainer(config(parts, **settings), data)
    assert again.resume()
    assert again.step == 3
    again.run()
    assert losses(parts) == expected
    assert_same_weights(again, whole)


def interrupt(trainer, step, *, at):
    """Save at 3, and die later, with steps behind the state."""
    if step == 3:
        trainer.save()
    if step == at:
        raise KeyboardInterrupt


def test_a_crash_while_saving_leaves_the_old_state(data, tmp_path):
    trainer = Trainer(config(tmp_path), data)
    trainer.save()
    (tmp_path / "state.partial").write_bytes(b"half")
    assert Trainer(config(tmp_path), data).resume()
    assert (tmp_path / STATE).exists()


def test_a_run_goes_on_with_its_settings(encoding, data, tmp_path):
    Trainer(config(tmp_path), data).save()
    with pytest.raises(ConfigError, match="begun with other settings: seed: 1, now 2"):
        Trainer(config(tmp_path, seed=2), data).resume()
    assert Trainer(config(tmp_path, save_every_s=1.0), data).resume()
    other = Conversations(encoding, [BashTool.declare()], [task("g.txt")], seed=1)
    with pytest.raises(ConfigError, match="begun with other settings: data: "):
        Trainer(config(tmp_path), other).resume()


def test_a_run_begins_with_the_weights_of_another_and_goes_on_with_its_own(data, tmp_path):
    early, late = tmp_path / "early", tmp_path / "late"
    for folder in (early, late):
        folder.mkdir()
    trained = Trainer(config(early, steps=2), data)
    trained.run()
    second = Trainer(config(late, begin=early / STATE), data)
    assert not second.resume()
    assert second.step == 0
    assert_same_weights(second, trained)
    second.take_step()
    second.save()
    third = Trainer(config(late, begin=early / STATE), data)
    assert third.resume()
    assert third.step == 1
    assert_same_weights(third, second)


def assert_same_weights(trainer, other):
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


def test_weights_to_begin_with_that_are_not_there_or_another_networks(data, tmp_path):
    state = tmp_path / "other" / STATE
    with pytest.raises(StorageError, match="cannot read the state to begin with"):
        Trainer(config(tmp_path, begin=state), data).resume()
    state.parent.mkdir()
    torch.save({"model": {"embed.weight": torch.zeros(1)}}, state)
    with pytest.raises(ConfigError, match="is not of this network"):
        Trainer(config(tmp_path, begin=state), data).resume()


def test_settings_that_do_not_fit(tmp_path):
    for changes, said in (
        ({"optimizer": "sgd"}, "expected 'muon' or 'adamw'"),
        ({"steps": 0}, "must be positive"),
        ({"narrowest_window": 0}, "expected 1 to 128"),
        ({"peak_lr": 1e-4}, "expected 0 to peak_lr, 0.0001, got 0.0002"),
    ):
        with pytest.raises(ConfigError, match=said):
            config(tmp_path, **changes)


def test_schedules(tmp_path):
    run = config(tmp_path, steps=100, warmup_steps=10, peak_lr=1.0, final_lr=0.1, decay_from=0.5)
    rates = [run.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:50] == [1.0] * 41
    assert rates[99] < 0.105
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert (run.mtp(0), run.mtp(99)) == (0.3, pytest.approx(0.1))
    assert {run.window(step) for step in range(100)} == {None}
    narrow = config(tmp_path, steps=100, narrow_share=0.5, narrowest_window=4)
    widths = [narrow.window(step) for step in range(1000)]
    assert 0.4 < widths.count(None) / 1000 < 0.6
    drawn = [width for width in widths if width is not None]
    assert 4 <= min(drawn) < 6 < 100 < max(drawn) <= 128
    assert widths == [narrow.window(step) for step in range(1000)]
