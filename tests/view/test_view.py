"""The page: what it lists and shows, and that nothing a run says becomes markup or a path."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from hadal.agent import Journal
from hadal.cli.local_names import LocalNames
from hadal.errors import ConfigError
from hadal.view import RunFiles, build_app, single_page

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def write_run(path, *, turns=1, text="Do it.", ends=True, result="ok"):
    with Journal(path) as journal:
        journal.append("start", version=1, system="System.", mode="thinking", tools=[])
        journal.append("user", text=text)
        for turn in range(turns):
            journal.append("prompt", ids=list(range(10)), anew=False)
            journal.append("tokens", ids=[1, 2], text="I ", logprobs=[-0.1, -2.0])
            journal.append("tokens", ids=[3], text="see.")
            call = [f"call_{turn}", "bash", json.dumps({"command": f"echo {turn}"})]
            message = {"content": "", "reasoning": f"thought {turn}", "calls": [call]}
            journal.append("reply", message=message, bad=None, problem="", termination="tool_calls",
                           problems=[], seconds=0.5, cached_tokens=4)  # fmt: skip
            journal.append("call", call=call[0], name="bash")
            journal.append("result", call=call[0], text=result, failed=False, exit_code=0, step=turn + 1,
                           full_text=None, seconds=0.1)  # fmt: skip
        if ends:
            journal.append("end", reason="done", text="done")
            journal.append("score", score=1, detail="")


@pytest.fixture
def client(tmp_path):
    write_run(tmp_path / "one.jsonl", turns=3, text=HOSTILE, result=HOSTILE)
    write_run(tmp_path / "two.jsonl", ends=False)
    (tmp_path / "broken.jsonl").write_bytes(b"nonsense\n")
    return TestClient(build_app(RunFiles(tmp_path)))


def test_list(client):
    rows = {row["id"]: row for row in client.get("/api/runs").json()}
    assert rows["one"] | {"task": ""} == {
        "id": "one", "state": "done", "outcome": "scored", "score": 1, "turns": 3, "tokens": 39, "task": "",
    }  # fmt: skip
    assert (rows["two"]["state"], rows["two"]["outcome"]) == ("interrupted", None)
    assert (rows["broken"]["outcome"], "damaged at line 1" in rows["broken"]["state"]) == (
        "void",
        True,
    )


def test_a_page_of_somebody_else_cannot_read_runs(tmp_path):
    asked = TestClient(LocalNames(build_app(RunFiles(tmp_path))))
    for host in ("127.0.0.1:8800", "127.0.0.2", "localhost:1", "[::1]:8800", "LOCALHOST"):
        assert asked.get("/api/runs", headers={"host": host}).status_code == 200
    for host in ("evil.example:8800", "localhost.evil.example", "[", "", "[::2]", "192.0.2.1", "127.0.0.1@evil.example", "\xe9"):  # fmt: skip
        reply = asked.get("/api/runs", headers={"host": host.encode("latin-1")})
        assert (reply.status_code, "name" in reply.text) == (421, True), host


def test_what_has_not_changed_is_not_read_again(client, tmp_path):
    first = client.get("/api/runs/two")
    tag = {"if-none-match": first.headers["etag"]}
    assert client.get("/api/runs/two", headers=tag).status_code == 304
    with Journal(tmp_path / "two.jsonl") as journal:
        journal.append("end", reason="max_turns", text="")
    again = client.get("/api/runs/two", headers=tag)
    assert again.json()["extra"]["stop_reason"] == "max_turns"
    assert again.headers["etag"] != first.headers["etag"]


def test_what_a_run_is_to_do_is_listed_before_it_has_begun(tmp_path):
    with Journal(tmp_path / "a.jsonl") as journal:
        journal.append("task", text="Do it.", command="c")
    assert RunFiles(tmp_path).rows()[0]["task"] == "Do it."


def test_a_row_follows_its_file(tmp_path):
    write_run(tmp_path / "a.jsonl", ends=False)
    files = RunFiles(tmp_path)
    assert files.rows()[0]["state"] == "interrupted"
    with Journal(tmp_path / "a.jsonl") as journal:
        assert files.rows()[0]["state"] == "running"
        journal.append("end", reason="max_turns", text="")
    assert files.rows()[0]["state"] == "max_turns"
    (tmp_path / "a.jsonl").unlink()
    assert files.rows() == []


def test_a_run_that_nobody_works_on_is_not_called_running(client, tmp_path):
    first = client.get("/api/runs/two")
    assert first.json()["extra"]["state"] == "interrupted"
    with Journal(tmp_path / "two.jsonl"):
        again = client.get("/api/runs/two", headers={"if-none-match": first.headers["etag"]})
        assert again.json()["extra"]["state"] == "running"
    assert client.get("/api/runs/two").json()["extra"]["state"] == "interrupted"
    assert "state" not in client.get("/api/runs/one").json()["extra"]


def test_tokens_of_a_turn(client):
    said = [{"ids": [1, 2], "text": "I ", "logprobs": [-0.1, -2.0]}, {"ids": [3], "text": "see."}]
    for step in (3, 4, 5):
        assert client.get(f"/api/runs/one/tokens/{step}").json() == {"said": said}
    for path in (
        "one/tokens/1",
        "one/tokens/2",
        "one/tokens/6",
        "nothing/tokens/3",
        "one/tokens/x",
    ):
        assert client.get(f"/api/runs/{path}").status_code == 404
    assert client.get("/api/runs/broken/tokens/1").status_code == 500


def test_one_run(client):
    found = client.get("/api/runs/one").json()
    assert [s["source"] for s in found["steps"]] == ["system", "user", "agent", "agent", "agent"]
    assert "prompt_token_ids" not in found["steps"][2]["metrics"]
    assert found["steps"][2]["observation"]["results"][0]["content"] == HOSTILE


@pytest.mark.parametrize(
    "path", ["/api/runs/nothing", "/api/runs/..%2Fone", "/api/runs/.hidden", "/export/nothing.html",
             "/../app.py", "/page/view.js", "/view.py", "/nothing.js"],
)  # fmt: skip
def test_nothing_else_is_served(client, path):
    assert client.get(path).status_code == 404


def test_a_broken_journal_is_an_error_with_its_reason(client):
    reply = client.get("/api/runs/broken")
    assert (reply.status_code, "damaged" in reply.text) == (500, True)


def test_the_page_loads_nothing_from_elsewhere(client):
    scripts = re.findall(r'src="(.*?)"', client.get("/").text)
    assert len(scripts) == 4
    for path in ("/", "/view.css", *scripts):
        reply = client.get(path)
        assert reply.status_code == 200
        assert "default-src 'self'" in reply.headers["content-security-policy"]
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", reply.text)
        assert "innerHTML" not in reply.text


def test_one_file_holds_it_all(client, tmp_path):
    page = client.get("/export/one.html").text
    assert "view.css" not in page
    assert "<script src=" not in page
    assert page.count("<script") == 5
    assert HOSTILE not in page
    data = re.search(r'id="embedded" data-run="one">(.*?)</script>', page, re.DOTALL).group(1)
    assert json.loads(data) == client.get("/api/runs/one").json()
    assert single_page({"session_id": '"><b>', "steps": []}).count("<b>") == 0


NO_UTF8 = "/a\udcff"  # a name of a file, as Python has it


def test_names_that_are_no_utf8(tmp_path):
    write_run(tmp_path / "one.jsonl", text=NO_UTF8, result=NO_UTF8)
    client = TestClient(build_app(RunFiles(tmp_path)))
    assert client.get("/api/runs").json()[0]["task"] == NO_UTF8
    found = client.get("/api/runs/one").json()
    assert found["steps"][2]["observation"]["results"][0]["content"] == NO_UTF8
    assert client.get("/export/one.html").status_code == 200


def write_void(path, *events):
    write_run(path, ends=False)
    with Journal(path) as journal:
        for kind, fields in events:
            journal.append(kind, **fields)


VOID = ("score", {"score": None, "detail": "the box is gone"})


@pytest.mark.parametrize(
    ("events", "state"),
    [([VOID], "void"),
     ([("end", {"reason": "done", "text": "42"}), VOID], "done"),
     ([("end", {"reason": "model_failed", "text": "no answer"}), VOID], "model_failed")],
)  # fmt: skip
def test_what_is_void_says_why(tmp_path, events, state):
    write_void(tmp_path / "one.jsonl", *events)
    files = RunFiles(tmp_path)
    (row,) = files.rows()
    assert (row["state"], row["outcome"], row["score"]) == (state, "void", None)
    extra = files.whole("one")["extra"]
    assert (extra["stop_reason"], extra["outcome"], extra["score_detail"]) == (
        state, "void", "the box is gone",
    )  # fmt: skip


def test_a_void_run_that_goes_on_is_not_void(tmp_path):
    write_void(tmp_path / "one.jsonl", VOID, ("box", {"id": "b", "log": "l"}))
    files = RunFiles(tmp_path)
    assert (files.rows()[0]["state"], files.rows()[0]["outcome"]) == ("interrupted", None)
    assert "score" not in files.whole("one")["extra"]


def test_why_the_model_failed_is_told(tmp_path):
    write_void(
        tmp_path / "one.jsonl", ("end", {"reason": "model_failed", "text": "cannot reach it"})
    )
    assert RunFiles(tmp_path).whole("one")["extra"]["stop_text"] == "cannot reach it"


def test_command_line(tmp_path):
    program = Path(sys.executable).with_name("hadal")

    def hadal(*arguments):
        return subprocess.run(
            [program, *map(str, arguments)], capture_output=True, text=True, check=False
        )

    write_run(tmp_path / "one.jsonl")
    done = hadal("view", tmp_path, "--export", "one", "--output", tmp_path / "one.html")
    assert done.returncode == 0, done.stderr
    assert "thought 0" in (tmp_path / "one.html").read_text()
    assert hadal("view", tmp_path / "nothing").returncode == 2
    refused = hadal("view", tmp_path, "--host", "0.0.0.0")
    assert (refused.returncode, "can be reached by others" in refused.stderr) == (2, True)


def test_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="there is no folder"):
        RunFiles(tmp_path / "nothing")
