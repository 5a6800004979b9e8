"""The network that comes with the package: V4's architecture in five million parameters, in the official layout.

It solves small shell tasks and nothing else. `recipes/nano.py` makes it, docs/nano.md says what it can do.
"""

from pathlib import Path

from hadal.errors import CheckpointError

__all__ = ["named_checkpoint", "nano_checkpoint"]


def nano_checkpoint() -> Path:
    """Return the folder of nano's checkpoint.

    Raises:
        CheckpointError: This installation has none.
    """
    folder = Path(__file__).parent / "checkpoint"
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"nano is not in this installation: there is no {folder}/config.json",
            hint="make it with recipes/nano.py, or name another checkpoint",
        )
    return folder


def named_checkpoint(path: Path) -> Path:
    """Return a checkpoint's folder; `nano` is the one in the package, unless there is such a folder here.

    Raises:
        CheckpointError: It is nano, and this installation has none.
    """
    return nano_checkpoint() if str(path) == "nano" and not path.exists() else path
