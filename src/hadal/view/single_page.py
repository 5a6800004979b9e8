"""One run in one HTML file, for people who have nothing but a browser."""

import html
import json
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
    script = f"<script>\n{page_file('view.js')}</script>"
    return page.replace('<script src="view.js"></script>', f"{embedded}\n{script}")
