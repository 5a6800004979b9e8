"""`hadal view`: a page of runs."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from hadal.cli.listening import is_loopback, listen, run_app
from hadal.cli.local_names import LocalNames
from hadal.cli.run import runs_folder
from hadal.errors import ConfigError

__all__ = ["view"]


def view(
    folder: Path | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8800,
    public: Annotated[bool, Parameter(negative="")] = False,
    export: str | None = None,
    output: Path | None = None,
) -> None:
    """Look at what agents did and do, in a browser.

    Examples:
        hadal view

        hadal view results --port 9000

        hadal view --export 3f2a91c04d7b --output run.html

    Args:
        folder: Of the runs. Default: where `hadal run` keeps them.
        host: Address to listen on.
        port: Port to listen on; 0 takes one that is free.
        public: Listen on an address that others can reach, all the same: they can read every run.
        export: Write this run into one HTML file instead.
        output: That file. Default: the run's id with .html.
    """
    from hadal.view import RunFiles, build_app, single_page

    console = Console(stderr=True)
    files = RunFiles(folder or runs_folder())
    if export is not None:
        path = output or Path(f"{export}.html")
        path.write_text(single_page(files.whole(export)), encoding="utf-8")
        console.print(f"wrote {path}", markup=False)
        return
    if not is_loopback(host) and not public:
        raise ConfigError(
            f"{host} can be reached by others, and the page has no keys",
            hint="listen on 127.0.0.1, or say --public",
        )
    taken, url = listen(host, port)
    console.print(url, markup=False)
    app = build_app(files)
    run_app(LocalNames(app) if is_loopback(host) else app, taken)
