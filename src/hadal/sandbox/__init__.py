"""Boxes for code that nobody trusts: the SDK.

Start with `Sandbox.create` (or `AsyncSandbox`); the node daemon behind it is `hadal.node`.
"""

from hadal.sandbox.box import AsyncSandbox
from hadal.sandbox.process import AsyncProcess
from hadal.sandbox.results import BoxInfo, CallResult, Event, ExecResult, FileStat, Usage
from hadal.sandbox.specs import ContainerSpec, FunctionSpec, Mount
from hadal.sandbox.sync import Files, Process, Sandbox

__all__ = [
    "AsyncProcess",
    "AsyncSandbox",
    "BoxInfo",
    "CallResult",
    "ContainerSpec",
    "Event",
    "ExecResult",
    "FileStat",
    "Files",
    "FunctionSpec",
    "Mount",
    "Process",
    "Sandbox",
    "Usage",
]
