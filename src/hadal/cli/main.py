"""Entry point: one verb tree, one place where errors become messages and exit codes.

Exit codes: 0 ok, 1 the task failed, 2 wrong usage or settings, 3 the machine or files failed.
"""

import os
import sys
import traceback

from cyclopts import App, CycloptsError
from rich.console import Console

from hadal import __version__
from hadal.cli import (
    bench,
    box,
    chat,
    checkpoint,
    cost,
    demo,
    disk,
    doctor,
    encoding,
    eval,
    image,
    node,
    replay,
    run,
    runs,
    serve,
    train,
    view,
)
from hadal.cli.examples import show_examples
from hadal.cli.idle_threads import let_idle_threads_sleep
from hadal.errors import ConfigError, EncodingError, HadalError, InputError
from hadal.plain_text import visible

__all__ = ["app", "main"]

_EXTRA_OF = {
    **dict.fromkeys(("transformers", "accelerate"), "parity"),
    **dict.fromkeys(("torch", "safetensors", "numpy", "jaxtyping"), "engine"),
    **dict.fromkeys(("starlette", "uvicorn", "httpx", "prometheus_client", "xgrammar"), "serve"),
    **dict.fromkeys(("aiohttp", "backports", "yarl"), "node"),
    "mcp": "mcp",
    "pyfuse3": "fuse",
}
"""Modules that only some commands need, and the extra that installs each."""

app = App(
    name="hadal",
    help="The open stack for long-running agents on DeepSeek-V4.",
    version=__version__,
)
app.command(cost.cost)
app.command(checkpoint.app)
app.command(encoding.encode)
app.command(encoding.decode)
app.command(demo.demo)
app.command(run.run)
app.command(runs.app)
app.command(view.view)
app.command(train.app)
app.command(eval.evaluate, name="eval")
app.command(serve.serve)
app.command(chat.chat)
app.command(replay.replay)
app.command(bench.app)
app.command(image.app)
app.command(disk.app)
app.command(box.app)
app.command(node.app)
app.command(doctor.doctor)


def main() -> None:
    """Run the command line."""
    console = Console(stderr=True)
    if sys.argv[1:2] != ["bench"]:  # which measures a machine of its own, and peers as they are
        let_idle_threads_sleep()
    if not {"--help", "-h"}.isdisjoint(sys.argv):
        show_examples(app)
    try:
        try:
            app(exit_on_error=False)
        finally:
            sys.stdout.flush()  # here, so that a full disk is an error like any other
    except CycloptsError:  # it has printed what is wrong
        sys.exit(2)
    except (ConfigError, EncodingError, InputError) as err:
        console.print(f"error: {visible(str(err))}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except HadalError as err:
        console.print(f"error: {visible(str(err))}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(3)
    except BrokenPipeError:  # the reader of a pipe left, as `head` does
        _abandon_stdout()
        sys.exit(3 if sys.argv[1:2] == ["run"] else 0)  # of a run, 0 would say that it answered
    except ModuleNotFoundError as err:
        if err.name not in _EXTRA_OF:
            raise
        console.print(
            f"error: this needs {err.name}, which is not installed\n"
            f"hint: pip install 'hadal[{_EXTRA_OF[err.name]}]'",
            markup=False,
            highlight=False,
        )
        sys.exit(2)
    except OSError as err:  # a full disk under standard output, an impossible path
        console.print(f"error: {visible(str(err))}", markup=False, highlight=False, soft_wrap=True)
        _abandon_stdout()
        sys.exit(3)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:  # noqa: BLE001 - a fault of this program: 1 would say that a task failed
        traceback.print_exc()
        sys.exit(3)


def _abandon_stdout() -> None:
    """Point standard output elsewhere, so that the flush at exit does not fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
