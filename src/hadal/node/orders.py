"""What a guest is told to run: from what was asked for, the spec of the box, and what its image says."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from hadal.node.guest_command import CommandOrder
from hadal.node.images import ResolvedImage
from hadal.sandbox.protocol import CommandRequest
from hadal.sandbox.specs import Spec

__all__ = ["ImageDefaults", "defaults_of", "order_of"]


@dataclass(frozen=True, kw_only=True)
class ImageDefaults:
    """What an image says about its commands."""

    env: Mapping[str, str] = field(default_factory=dict[str, str])
    working_dir: str = "/"
    user: str = "0"


def defaults_of(root: ResolvedImage) -> ImageDefaults:
    """Return what an image says about its commands."""
    return ImageDefaults(
        env=root.config.environment,
        working_dir=root.config.working_directory or "/",
        user=root.config.user or "0",
    )


def order_of(request: CommandRequest, spec: Spec, defaults: ImageDefaults) -> CommandOrder:
    """Return the order for a command.

    Args:
        request: What was asked for.
        spec: Of the box.
        defaults: Of its image.
    """
    argv = request.argv if request.argv is not None else ("/bin/sh", "-c", request.shell or "")
    environment = {**defaults.env, **spec.env, **request.env}
    if request.tty is not None:
        environment.setdefault("TERM", "xterm-256color")
    directory = request.cwd or spec.working_dir or defaults.working_dir
    return CommandOrder(
        arguments=[os.fsencode(a) for a in argv],
        environment=environment,
        directory=os.fsencode(directory),
        user=request.user or spec.user or defaults.user,
        tty=request.tty,
        stdin=request.stdin is not None or request.interactive,
        timeout_ms=round(1000 * request.timeout_s) if request.timeout_s else 0,
        quiet_ms=round(1000 * request.quiet_s) if request.quiet_s else 0,
        output_limit=request.output_limit,
        nofile=spec.nofile,
    )
