"""A page on which runs can be looked at, while they go on and afterwards.

`build_app` serves a folder of journals; `single_page` puts one run into one HTML file.
"""

from hadal.agent.run_files import RunFiles
from hadal.view.app import build_app
from hadal.view.single_page import single_page

__all__ = ["RunFiles", "build_app", "single_page"]
