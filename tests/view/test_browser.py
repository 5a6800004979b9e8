"""The page in a real Chromium: what people see and press."""

import json
import shutil
import threading

import pytest

from hadal.agent import Journal
from hadal.cli.listening import listen
from hadal.view import RunFiles, build_app, single_page
from tests.view.test_view import HOSTILE, write_run

pytestmark = pytest.mark.browser
uvicorn = pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def browser():
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("there is no chromium (make browser)")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path / "solved.jsonl", turns=3, text="Count the lines.", result="42")
    write_run(tmp_path / "hostile.jsonl", turns=2, text=HOSTILE, result=HOSTILE)
    write_run(tmp_path / "open.jsonl", turns=1, text="Not over yet.", ends=False)
    return tmp_path


@pytest.fixture
def url(folder):
    taken, address = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(build_app(RunFiles(folder)), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
    thread.start()
    yield address
    server.should_exit = True
    thread.join()


@pytest.fixture
def page(browser, url):
    """A page that has said nothing on its console, asked no other host, and raised nothing."""
    context = browser.new_context()
    opened = context.new_page()
    said, asked = [], []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(url)
    opened.wait_for_selector("#runs li")
    yield opened
    context.close()
    assert said == []
    assert all(address.startswith(url) for address in asked)


def rows(page):
    return page.locator("#runs li .what").all_text_contents()


def steps(page):
    return page.locator("#steps .step")


def test_list_and_filters(page):
    assert sorted(rows(page)) == sorted(["Count the lines.", HOSTILE, "Not over yet."])
    page.fill("#filter", "count")
    assert rows(page) == ["Count the lines."]
    page.fill("#filter", "")
    page.select_option("#outcome", "interrupted")
    assert rows(page) == ["Not over yet."]
    page.select_option("#outcome", "running")
    assert rows(page) == []
    page.select_option("#outcome", "solved")
    assert len(rows(page)) == 2
    assert page.locator("#count").text_content() == "2 of 3"


def test_what_can_be_done_is_said_where_no_run_is_chosen(page, url):
    assert "Choose a run. Keys: j and k step" in page.locator("#steps").text_content()
    assert not page.locator("#search").is_visible()
    page.goto(f"{url}/#/solved")
    page.wait_for_selector("#step-5")
    assert page.locator("#search").is_visible()
    page.go_back()
    page.wait_for_selector("text=Choose a run.")
    assert (page.locator(".step").count(), page.locator("#about").is_visible()) == (0, False)


def test_a_run_its_search_and_its_keys(page):
    page.click("text=Count the lines.")
    page.wait_for_selector("#step-5")
    assert steps(page).count() == 5
    assert "$ echo 1" in steps(page).nth(3).text_content()
    assert "thought 1" in steps(page).nth(3).text_content()
    assert page.locator("#context rect.cached").count() == 3
    page.keyboard.press("/")
    page.keyboard.type("echo 2")
    page.wait_for_function("document.querySelectorAll('#steps .step').length == 1")
    assert page.locator("mark").all_text_contents() == ["echo 2"]
    page.fill("#search", "")
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert page.locator(".step.current").get_attribute("id") == "step-2"
    page.keyboard.press("/")
    page.keyboard.type("echo 2")
    page.keyboard.press("Escape")
    assert (page.input_value("#search"), steps(page).count()) == ("", 5)


def test_tokens_of_a_turn(page):
    page.click("text=Count the lines.")
    page.click("#step-4 button:text('tokens')")
    page.wait_for_selector("#step-4 .token")
    tokens = page.locator("#step-4 .token")
    assert tokens.all_text_contents() == ["I ", "see."]
    assert "id 2, log-probability -2.0000, 13.5 %" in tokens.nth(0).get_attribute("title")
    assert "4 tokens from the cache" in page.locator("#step-4 .tokens").text_content()
    page.click("#step-4 button:text('tokens')")
    assert page.locator(".token").count() == 0


def test_a_link_to_a_step(page, url):
    page.goto(f"{url}/#/solved/4")
    page.wait_for_selector("#step-4.current")


def test_a_link_to_a_step_that_a_search_hides(page):
    page.click("text=Count the lines.")
    page.wait_for_selector("#step-5")
    page.fill("#search", "echo 2")
    page.wait_for_function("document.querySelectorAll('#steps .step').length == 1")
    page.evaluate("location.hash = '#/solved/3'")
    page.wait_for_selector("#step-3.current")
    assert page.input_value("#search") == ""


def test_a_link_to_a_step_that_is_still_to_come(page, folder, url):
    page.goto(f"{url}/#/open/4")
    page.wait_for_selector("text=there is no step 4 yet")
    assert page.locator(".step.current").count() == 0
    with Journal(folder / "open.jsonl") as journal:
        journal.append("user", text="Go on.")
    page.wait_for_selector("#step-4.current", timeout=5000)
    assert page.locator("#note").text_content() == ""


def test_runs_are_chosen_by_keyboard(page):
    page.focus("#outcome")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.matches('#runs a')")
    page.keyboard.press("Enter")
    page.wait_for_selector("#step-3")
    page.wait_for_selector("#runs a[aria-current=page]")
    assert page.evaluate("document.activeElement.matches('#runs a[aria-current]')")
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.id") == "step-1"


def test_search_finds_what_is_shown(page, folder):
    write_run(folder / "deep.jsonl", turns=1, text="Look.", ends=False)
    with Journal(folder / "deep.jsonl") as journal:
        journal.append("prompt", ids=[1], anew=False)
        call = ["c8", "bash", json.dumps({"command": 'grep "hello" a\\b.txt\nls\t-l'})]
        made = ["c9", "probe", json.dumps({"deep": ["one", {"more": "needle"}]})]
        message = {"content": "", "reasoning": "", "calls": [call, made]}
        journal.append("reply", message=message, bad=None, problem="", termination="tool_calls",
                       problems=["an odd thing"], seconds=0.5, cached_tokens=4)  # fmt: skip
        changed = [{"path": "/data/new.txt", "kind": "created", "diff": "+fresh line"}]
        journal.append("result", call="c8", text="ok", failed=False, exit_code=7, step=2,
                       full_text=None, seconds=0.1, files=changed)  # fmt: skip
    page.click("text=Look.")
    page.wait_for_selector("#step-4")
    for wanted in ('grep "hello" a\\b.txt', "ls\t-l", "probe", "needle", "new.txt", "fresh line", "odd thing", "exit code 7"):  # fmt: skip
        page.fill("#search", wanted)
        assert page.locator("#found").text_content() == "1 of 4 steps", wanted
        assert page.locator("mark").first.text_content() == wanted


def test_nothing_that_a_model_gives_stops_the_page(page, folder):
    odd = [
        {"command": "view", "path": "/a", "view_range": "1 20"},
        {"command": "view", "path": "/a", "view_range": 5},
        {"command": "create", "path": "/a", "file_text": {"not": "text"}},
        {"command": "insert", "path": "/a", "insert_line": [1], "new_str": None},
        {"command": "str_replace", "path": "/a", "old_str": 3},
        {"command": ["ls"]}, {"path": {}}, [], "text", None,
    ]  # fmt: skip
    with Journal(folder / "open.jsonl") as journal:
        journal.append("prompt", ids=[1], anew=False)
        calls = [[f"c{n}", "str_replace_editor", json.dumps(given)] for n, given in enumerate(odd)]
        message = {"content": "", "reasoning": "", "calls": calls}
        journal.append("reply", message=message, bad=None, problem="", termination="tool_calls",
                       problems=[], seconds=0.5, cached_tokens=4)  # fmt: skip
        page.click("text=Not over yet.")
        page.wait_for_selector("#step-4")
        assert page.locator("#step-4 pre").count() == len(odd)
        journal.append("end", reason="max_turns", text="")
    page.wait_for_selector("#facts >> text=max_turns", timeout=5000)


def test_a_long_task_leaves_room_for_its_steps(page, folder):
    write_run(folder / "long.jsonl", turns=3, text="word " * 2000)
    page.wait_for_selector("text=word word", timeout=8000)
    page.click("#runs >> text=word word")
    page.wait_for_selector("#step-5")
    assert page.locator("#steps").bounding_box()["height"] > 400
    assert page.title().startswith("word word")


def test_a_score_that_comes_after_the_end(page, folder):
    page.click("text=Not over yet.")
    page.wait_for_selector("#step-3")
    with Journal(folder / "open.jsonl") as journal:
        journal.append("end", reason="done", text="42")
        page.wait_for_selector("#facts >> text=done", timeout=5000)
        journal.append("score", score=0, detail="the file has 41")
    page.wait_for_selector("#facts >> text=done, not solved: the file has 41", timeout=9000)


def test_what_nobody_changed_stays_as_it_is(page, folder):
    """A scroll, a selection and a chosen step outlive what comes to a run, also while one searches."""
    with Journal(folder / "open.jsonl") as journal:
        page.click("text=Not over yet.")
        page.wait_for_selector("#step-3")
        page.fill("#search", "t")
        page.locator("#search").blur()
        page.keyboard.press("j")
        for step in (1, 2, 3):
            page.locator(f"#step-{step}").evaluate("s => { s.dataset.seen = 'yes'; }")
        journal.append("user", text="Then this.")
        page.wait_for_selector("#step-4", timeout=5000)
    assert page.locator("[data-seen=yes]").count() == 3
    assert page.locator(".step.current").get_attribute("id") == "step-1"


def test_a_run_that_cannot_be_read_shows_nothing_of_another(browser, folder, url):
    (folder / "broken.jsonl").write_bytes(b"nonsense\n")
    context = browser.new_context()  # whose console may tell of the refusal
    page = context.new_page()
    page.goto(f"{url}/#/solved")
    page.wait_for_selector("#step-5")
    page.click("#runs a[href='#/broken']")
    page.wait_for_selector("#note >> text=damaged at line 1")
    assert page.locator("#title").text_content() == ""
    assert page.locator("#facts span, #context rect, .step").count() == 0
    context.close()


def test_light_and_dark(page):
    seen = set()
    for _ in range(2):
        page.keyboard.press("t")
        seen.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(seen) == 2


def test_what_a_run_says_stays_text(page):
    page.goto(page.url.split("#")[0] + "#/hostile")
    page.wait_for_selector("#step-4")
    assert page.locator("#steps img, #steps script").count() == 0
    assert HOSTILE in steps(page).nth(1).text_content()


def test_a_running_one_is_followed(page, folder):
    page.click("text=Not over yet.")
    page.wait_for_selector("#step-3")
    page.locator("#step-3").evaluate("s => { s.dataset.seen = 'yes'; }")
    page.locator("#step-2").evaluate("s => { s.dataset.seen = 'yes'; }")
    assert "interrupted" in page.locator("#facts").text_content()
    with Journal(folder / "open.jsonl") as journal:
        page.wait_for_selector("#facts >> text=running", timeout=5000)
        journal.append("prompt", ids=[1], anew=False)
        journal.append("tokens", ids=[1, 2], text="That is")
        journal.append("tokens", ids=[3], text=" <b>all")
        page.wait_for_selector("text=3 tokens so far", timeout=5000)
        assert page.locator("#pending .said").text_content() == "That is <b>all"
        ended = {"bad": None, "problem": "", "termination": "stop", "problems": [], "seconds": 0.5, "cached_tokens": 4}  # fmt: skip
        message = {"content": "", "reasoning": "", "calls": [["c9", "bash", '{"command": "make"}']]}
        journal.append("reply", message=message, **ended)
        journal.append("call", call="c9", name="bash")
        journal.append("output", call="c9", text="compiling <b>one\n")
        page.wait_for_selector("text=compiling <b>one", timeout=5000)
        journal.append("output", call="c9", text="compiling two\n")
        page.wait_for_selector("text=compiling two", timeout=5000)
        assert page.locator("#step-4").text_content().endswith("running")
        journal.append("result", call="c9", text="compiling <b>one\ncompiling two\n", failed=False,
                       exit_code=0, step=1, full_text=None, seconds=2.0, files=[])  # fmt: skip
        page.wait_for_selector("text=exit code 0 · 2.00 s", timeout=5000)
        message = {"content": "That is all.", "reasoning": "", "calls": []}
        journal.append("prompt", ids=[1], anew=False)
        journal.append("reply", message=message, **ended)
        journal.append("end", reason="done", text="That is all.")
    page.wait_for_selector("text=That is all.", timeout=5000)
    assert page.locator("#step-2").get_attribute("data-seen") == "yes"  # what was there stays
    assert page.locator("#pending").count() == 0
    assert "done" in page.locator("#facts").text_content()


def test_a_file_that_needs_no_server(browser, folder, tmp_path):
    path = tmp_path / "run.html"
    path.write_text(single_page(RunFiles(folder).whole("hostile")))
    context = browser.new_context(offline=True)
    opened, said = context.new_page(), []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    opened.goto(path.as_uri())
    opened.wait_for_selector("#step-4")
    assert HOSTILE in steps(opened).nth(1).text_content()
    assert said == []
    context.close()
