"""The page of runs with a long one, in a real Chromium: time to the first paint, to all steps, and of scrolling.

    python benchmarks/view_page.py --events 10000

Prints one JSON object a round, then the medians. A frame of a 60 Hz screen has 16.7 ms.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import uvicorn
from playwright.sync_api import Browser, sync_playwright

from hadal.agent import Journal
from hadal.cli.listening import listen
from hadal.view import RunFiles, build_app

SCROLL = """async () => {
  const steps = document.getElementById('steps'), frames = [];
  let last = performance.now();
  for (let at = 0; at < 120; at++) {
    steps.scrollTop += 900;
    await new Promise(requestAnimationFrame);
    const now = performance.now();
    frames.push(now - last); last = now;
  }
  return frames;
}"""
FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--events", type=int, default=10_000, help="of the journal")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        count = write_journal(Path(folder) / "long.jsonl", options.events)
        taken, url = listen("127.0.0.1", 0)
        app = build_app(RunFiles(Path(folder)))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        rows: list[dict[str, Any]] = []
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=options.chromium, args=["--no-sandbox"]
            )
            for _ in range(options.rounds):
                rows.append({"events": count} | measure(browser, url))
                print(json.dumps(rows[-1]), flush=True)
            browser.close()
        server.should_exit = True
        thread.join()
    print(json.dumps({"median": {k: round(statistics.median(r[k] for r in rows), 1) for k in rows[0]}}))  # fmt: skip


def write_journal(path: Path, events: int) -> int:
    """Write a run of about so many events; return how many there are."""
    with Journal(path) as journal:
        journal.append("start", version=1, system="You work in a box.", mode="thinking", tools=[])
        journal.append("user", text="A long piece of work.")
        written = 2
        turn = 0
        while written < events:
            journal.append("prompt", ids=list(range(60)), anew=False)
            for _ in range(6):
                journal.append("tokens", ids=list(range(10)))
            call = [
                f"call_{turn}", "bash", json.dumps({"command": f"grep -rn thing_{turn} src | head"}),
            ]  # fmt: skip
            message = {"content": "", "reasoning": f"I look for thing {turn}. " * 6, "calls": [call]}  # fmt: skip
            journal.append("reply", message=message, bad=None, problem="", termination="tool_calls",
                           problems=[], seconds=0.5, cached_tokens=4)  # fmt: skip
            journal.append("call", call=call[0], name="bash")
            text = "\n".join(f"src/module_{turn}.py:{n}: thing_{turn} = {n}" for n in range(15))
            journal.append("result", call=call[0], text=text, failed=False, exit_code=0, step=turn + 1,
                           full_text=None, seconds=0.1)  # fmt: skip
            written += 10
            turn += 1
    return written


def measure(browser: Browser, url: str) -> dict[str, float]:
    """Open the run in a fresh context; return milliseconds."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    began = time.monotonic()
    page.goto(f"{url}/#/long")
    page.wait_for_selector("#step-1")
    all_ms = (time.monotonic() - began) * 1e3
    paint_ms = page.evaluate(FIRST_PAINT)
    frames = sorted(page.evaluate(SCROLL))
    began = time.monotonic()
    page.fill("#search", "thing_77 ")
    page.wait_for_function("document.getElementById('found').textContent.includes('of')")
    search_ms = (time.monotonic() - began) * 1e3
    context.close()
    return {
        "first_paint_ms": round(paint_ms, 1), "all_steps_ms": round(all_ms, 1),
        "frame_median_ms": round(statistics.median(frames), 1), "frame_p95_ms": round(frames[int(len(frames) * 0.95)], 1),
        "frame_worst_ms": round(frames[-1], 1), "search_ms": round(search_ms, 1),
    }  # fmt: skip


if __name__ == "__main__":
    main()
