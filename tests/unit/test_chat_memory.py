"""Lost reasoning is put back; wrong reasoning never is; stores survive what files go through."""

import signal
import sqlite3
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from hadal.chat import (
    AssistantMessage,
    ImagePart,
    SystemMessage,
    TextPart,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from hadal.chat.memory import InMemoryStore, ReasoningMemory, SQLiteStore
from hadal.errors import InputError, StorageError

ENTRY_BYTES = 64


def turn(reasoning="why", *, content="a", call_id="c1", arguments='{"x": 1}'):
    return AssistantMessage(content, reasoning, (ToolCall("f", arguments, call_id),))


def lost(message):
    return replace(message, reasoning_content=None)


@pytest.fixture(params=["memory", "sqlite"])
def make_store(request, tmp_path):
    """Makes stores of one kind; closes them at the end."""
    stores = []

    def make(**bounds):
        path = tmp_path / f"{len(stores)}.db"
        in_memory = request.param == "memory"
        stores.append(InMemoryStore(**bounds) if in_memory else SQLiteStore(path, **bounds))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def memory(make_store):
    return ReasoningMemory(make_store())


def restored(memory, message, **options):
    return memory.restore([message], **options).messages[0].reasoning_content


# What is restored


def test_a_turn_is_found_by_the_ids_of_its_calls(memory):
    history = [UserMessage("q"), lost(turn()), ToolMessage("r", "c1")]
    assert memory.remember(turn())
    found = memory.restore(history)
    assert found.messages == (history[0], turn(), history[2])
    assert found.turns == (1,)
    assert found.messages[0] is history[0]


def test_a_turn_without_calls_is_found_by_its_response(memory):
    message = AssistantMessage("a", "why")
    assert not memory.remember(message)
    assert memory.remember(message, response_id="resp_1")
    assert memory.restore([lost(message)]).turns == ()
    assert memory.restore([lost(message)], response_ids={0: "resp_2"}).turns == ()
    assert restored(memory, lost(message), response_ids={0: "resp_1"}) == "why"


def test_a_turn_without_reasoning_or_without_an_id_is_not_kept(memory):
    assert not memory.remember(lost(turn()))
    assert not memory.remember(turn(call_id=None))
    assert memory.restore([lost(turn(call_id=None))]).turns == ()


@pytest.mark.parametrize("placeholder", [None, "", " ", "\n"])
def test_placeholders_count_as_lost(memory, placeholder):
    memory.remember(turn())
    assert restored(memory, turn(placeholder)) == "why"


def test_reasoning_that_the_client_sent_is_kept(memory):
    memory.remember(turn("mine"))
    found = memory.restore([turn("theirs")])
    assert found.messages == (turn("theirs"),)
    assert found.turns == ()


def test_reasoning_that_was_empty_is_known_to_be_empty(memory):
    memory.remember(turn(""))
    found = memory.restore([lost(turn()), turn("")])
    assert [m.reasoning_content for m in found.messages] == ["", ""]
    assert found.turns == (0,)


def test_scopes_do_not_see_each_other(memory):
    memory.remember(turn("a's"), scope="a")
    memory.remember(turn("b's"), scope="b")
    assert restored(memory, lost(turn()), scope="a") == "a's"
    assert restored(memory, lost(turn()), scope="b") == "b's"
    assert restored(memory, lost(turn())) is None


@pytest.mark.parametrize(
    "other",
    [
        turn(content="b"),
        turn(arguments='{"x": 2}'),
        turn(arguments='{"x": 1'),
        turn(call_id="c2"),
        AssistantMessage("a", None, (ToolCall("g", '{"x": 1}', "c1"),)),
        AssistantMessage("a", None, (*turn().tool_calls, ToolCall("f", "{}", "c2"))),
        AssistantMessage((TextPart("a"), ImagePart("u")), None, turn().tool_calls),
    ],
)
def test_another_turn_under_the_same_id_gets_nothing(memory, other):
    memory.remember(turn(), response_id="resp_1")
    assert memory.restore([lost(other)]).turns == ()


def test_the_response_must_say_the_same(memory):
    memory.remember(turn(), response_id="resp_1")
    other = lost(turn(content="b", call_id="c9"))
    assert memory.restore([other], response_ids={0: "resp_1"}).turns == ()


def test_turns_that_share_an_id_are_told_apart_by_what_they_say(memory):
    memory.remember(turn("one", content="1", call_id="call_0"))
    memory.remember(turn("two", content="2", call_id="call_0"))
    found = memory.restore([lost(turn(content=c, call_id="call_0")) for c in "21"])
    assert [m.reasoning_content for m in found.messages] == ["two", "one"]


def test_turns_that_differ_only_in_their_reasoning_get_nothing(memory):
    memory.remember(turn("one"))
    memory.remember(turn("one"))
    assert restored(memory, lost(turn())) == "one"
    memory.remember(turn("two"))
    memory.remember(turn("one"))
    assert restored(memory, lost(turn())) is None


def test_the_response_tells_turns_apart_that_calls_do_not(memory):
    memory.remember(turn("one"), response_id="resp_1")
    memory.remember(turn("two"), response_id="resp_2")
    found = memory.restore([lost(turn())] * 3, response_ids={0: "resp_2", 1: "resp_1"})
    assert [m.reasoning_content for m in found.messages] == ["two", "one", None]


@pytest.mark.parametrize(
    "message",
    [
        turn(arguments='{"b":[1.0,2],"a":"Ä"}'),
        turn(arguments='{ "a": "\\u00c4", "b": [1, 2.0] }'),
        turn(arguments='{"a": "Ä", "b": [1, 2]}', content="a\n"),
        turn(arguments='{"a": "Ä", "b": [1, 2]}', content=(TextPart("a"),)),
    ],
)
def test_what_clients_change_in_passing_does_not_matter(memory, message):
    memory.remember(turn(arguments='{"a": "Ä", "b": [1, 2]}'))
    assert restored(memory, lost(message)) == "why"


def test_parts_match_their_joined_text(memory):
    memory.remember(turn(content="a\n\nb"))
    assert restored(memory, lost(turn(content=(TextPart("a"), TextPart("b"))))) == "why"


@pytest.mark.parametrize("arguments", ["[" * 100_000, "not json", '"text"', '{"x": 1e999}'])
def test_arguments_may_be_anything(memory, arguments):
    memory.remember(turn(arguments=arguments))
    assert restored(memory, lost(turn(arguments=arguments))) == "why"


@pytest.mark.parametrize("reasoning", ["日本語 🐟", "nul \0", "half \ud83d", "x" * 1_000_000])
def test_any_text_comes_back_as_it_was(memory, reasoning):
    memory.remember(turn(reasoning))
    assert restored(memory, lost(turn())) == reasoning


def test_messages_of_others_are_left_alone(memory):
    history = (SystemMessage("s"), UserMessage("u"), ToolMessage("r", "c1"))
    assert memory.restore(history).messages == history


# Bounds


def test_the_least_recently_used_is_evicted_by_number(make_store):
    memory = ReasoningMemory(make_store(max_entries=2))
    memory.remember(turn(call_id="a"))
    memory.remember(turn(call_id="b"))
    assert memory.restore([lost(turn(call_id="a"))]).turns == (0,)
    memory.remember(turn(call_id="c"))
    found = memory.restore([lost(turn(call_id=i)) for i in "abc"])
    assert found.turns == (0, 2)


def test_the_least_recently_used_is_evicted_by_size(make_store):
    store = make_store(max_bytes=3 * (ENTRY_BYTES + 10))
    for slot in "abc":
        store.save([slot], slot * 10)
    assert store.load("abc").keys() == set("abc")
    store.save(["d"], "d" * 11)
    assert store.load("abcd").keys() == set("cd")


def test_size_counts_bytes_and_no_longer_what_was_replaced(make_store):
    store = make_store(max_bytes=3 * ENTRY_BYTES + 10)
    store.save(["a"], "é" * 5)
    store.save(["a"], "other")  # spoilt: its text is gone
    store.save(["b"], "é" * 5)
    store.save(["c"], "")
    assert store.load("abc").keys() == set("bc")
    store.save(["d"], "")
    assert store.load("bcd").keys() == set("bcd"), "only the spoilt slot had to go"


def test_a_text_that_does_not_fit_alone_evicts_nothing(make_store):
    store = make_store(max_bytes=2 * (ENTRY_BYTES + 10))
    store.save(["a"], "a" * 10)
    store.save(["b"], "b" * 1000)
    assert store.load("ab") == {"a": "a" * 10}


def test_bounds_must_allow_something(make_store):
    for bounds in ({"max_entries": 0}, {"max_bytes": 0}):
        with pytest.raises(InputError, match="at least"):
            make_store(**bounds)


def test_threads_may_share_a_store(make_store):
    store = make_store()

    def work(number):
        for i in range(20):
            store.save([f"{number}-{i}"], f"{number}-{i}")
            assert store.load([f"{number}-{i}"])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    slots = [f"{n}-{i}" for n in range(4) for i in range(20)]
    assert store.load(slots) == {slot: slot for slot in slots}


# The file

WRITER = """
import sys
from hadal.chat.memory import SQLiteStore
store = SQLiteStore(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for i in range(int(sys.argv[3])):
    store.save([f"{sys.argv[2]}-{i}"], "x" * 1000)
    print(i, flush=True)
store.close()
"""


def writer(path, name, count):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), name, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def start(process):
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "reasoning.db"


def test_the_file_outlives_the_store(path):
    with SQLiteStore(path) as store:
        ReasoningMemory(store).remember(turn())
    memory = ReasoningMemory(SQLiteStore(path))
    assert restored(memory, lost(turn())) == "why"
    memory.close()


def test_a_new_file_and_its_log_are_for_the_owner_only(path):
    with SQLiteStore(path) as store:
        store.save(["a"], "text")
        files = list(path.parent.iterdir())
        assert len(files) == 3
        assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_two_processes_write_at_once(path):
    with writer(path, "a", 100) as one, writer(path, "b", 100) as two:
        start(one)
        start(two)
        assert one.communicate(timeout=60)[0].count("\n") == 100
        assert two.communicate(timeout=60)[0].count("\n") == 100
    assert one.returncode == two.returncode == 0
    with SQLiteStore(path) as store:
        slots = [f"{name}-{i}" for name in "ab" for i in range(100)]
        assert len(store.load(slots)) == 200


def test_a_kill_in_the_middle_of_writes_loses_nothing_that_was_confirmed(path):
    with writer(path, "a", 1_000_000) as process:
        start(process)
        for expected in range(50):
            assert process.stdout.readline() == f"{expected}\n"
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    with SQLiteStore(path) as store:
        assert len(store.load([f"a-{i}" for i in range(50)])) == 50
    database = sqlite3.connect(path)
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    entries, size = database.execute("SELECT count(*), sum(size) FROM entry").fetchone()
    assert database.execute("SELECT entries, size FROM total").fetchone() == (entries, size)
    database.close()


FORK = """
import os, sys
from hadal.chat.memory import SQLiteStore
store = SQLiteStore(sys.argv[1])
store.save(["a"], "parent")
child = os.fork()
if child == 0:
    store.save(["b"], "child")
    os._exit(0 if store.load(["a"]) == {"a": "parent"} else 1)
print(os.waitpid(child, 0)[1])
store.save(["c"], "parent")
print(store.load(["a", "b", "c"]))
store.close()
"""


def script(code, path):
    """Run a program of its own: it forks, or gives up rights for good."""
    return subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)


def test_a_forked_process_uses_a_connection_of_its_own(path):
    done = script(FORK, path)
    assert done.stdout == "0\n{'a': 'parent', 'b': 'child', 'c': 'parent'}\n", done.stderr


def test_a_corrupt_file_is_an_error_with_a_way_out(path):
    path.write_bytes(b"this is no database " * 500)
    with pytest.raises(StorageError, match="not a database") as caught:
        SQLiteStore(path)
    assert "delete it" in caught.value.hint


def test_a_page_that_was_overwritten_is_an_error(path):
    with SQLiteStore(path) as store:
        for i in range(200):
            store.save([str(i)], "x" * 500)
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(StorageError, match="malformed") as caught:
        SQLiteStore(path).save(["a"], "text")
    assert "delete it" in caught.value.hint


def test_a_database_of_something_else_is_not_touched(path):
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE precious (x)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(StorageError, match="something else"):
        SQLiteStore(path)
    assert path.read_bytes() == before


def test_a_store_of_another_version_is_refused(path):
    SQLiteStore(path).close()
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StorageError, match="expected schema version 1, got 99"):
        SQLiteStore(path)


def test_a_folder_that_is_missing_is_an_error(tmp_path):
    for bad in (tmp_path / "no" / "file.db", tmp_path):
        with pytest.raises(StorageError, match="cannot open"):
            SQLiteStore(bad)


UNPRIVILEGED = """
import os, sys
from hadal.chat.memory import SQLiteStore
from hadal.errors import StorageError
if os.geteuid() == 0:
    os.seteuid(65534)  # permissions do not bind root
try:
    SQLiteStore(sys.argv[1])
except StorageError as err:
    print(err.message)
"""


@pytest.mark.parametrize("exists", [False, True])
def test_a_read_only_folder_is_an_error(exists):
    # pytest's own folders are closed to other users, so they would fail for another reason
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.db")
        if exists:
            SQLiteStore(path).close()
            path.chmod(0o444)
        Path(folder).chmod(0o555)
        done = script(UNPRIVILEGED, path)
        Path(folder).chmod(0o755)
    reason = "readonly database" if exists else "Permission denied"
    assert done.stdout.startswith("cannot open the reasoning store"), done.stderr
    assert reason in done.stdout


FULL = """
import resource, signal, sys
from hadal.chat.memory import SQLiteStore
from hadal.errors import StorageError
store = SQLiteStore(sys.argv[1])
store.save(["a"], "kept")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    store.save(["b"], "x" * 1_000_000)
except StorageError as err:
    print(err.message)
print(store.load(["a", "b"]))
"""


def test_a_full_disk_is_an_error_and_what_was_stored_stays(path):
    result = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True)
    first, second = result.stdout.splitlines()
    assert first.startswith("cannot use the reasoning store"), result.stderr
    assert second == "{'a': 'kept'}"


def test_another_writer_that_never_ends_is_an_error_after_the_timeout(path):
    with SQLiteStore(path, timeout_s=0.01) as store:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="locked"):
            store.save(["a"], "text")
        other.execute("ROLLBACK")
        other.close()
        store.save(["a"], "text")
        assert store.load(["a"]) == {"a": "text"}


def test_a_closed_store_cannot_be_used(path):
    store = SQLiteStore(path)
    store.close()
    with pytest.raises(StorageError, match="closed"):
        store.save(["a"], "text")
