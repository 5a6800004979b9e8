"""One run in one HTML file, for people who have nothing but a browser."""

import html
import json
import re
from importlib import resources
from typing import Any

__all__ = ["page_file", "single_page"]


def page_file(name: str) -> str:
    """Return a file of the page."""
    return resources.files("hadal.view").joinpath("page", name).read_text(encoding="utf-8")


def single_page(trajectory: dict[str, Any]) -> str:
    """Return a page that shows an ATIF trajectory and needs nothing else.

    What the run says is data in it: no text can end the element that holds it.
    """
    data = json.dumps(trajectory).replace("<", "\\u003c")
    run = html.escape(str(trajectory["session_id"]), quote=True)
    page = page_file("index.html").replace('<link rel="icon" href="icon.svg">\n', "")
    page = page.replace(
        '<link rel="stylesheet" href="view.css">', f"<style>\n{page_file('view.css')}</style>"
    )
    embedded = f'<script type="application/json" id="embedded" data-run="{run}">{data}</script>'
    page = re.sub(r'<script src="(\w+\.js)"></script>', _inline, page)
    return page.replace("<script>", f"{embedded}\n<script>", 1)  # before what reads it


def _inline(found: re.Match[str]) -> str:
    return f"<script>\n{page_file(found[1])}</script>"
