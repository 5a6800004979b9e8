"""Boxes for code that nobody trusts: the SDK.

Start with `Sandbox.create` (or `AsyncSandbox`); the node daemon behind it is `hadal.node`.
"""

from hadal.sandbox.box import AsyncSandbox
from hadal.sandbox.network_policy import NetworkPolicy
from hadal.sandbox.process import AsyncProcess
from hadal.sandbox.replay import Difference, ReplayReport
from hadal.sandbox.results import (
    BoxInfo,
    CallResult,
    Change,
    Event,
    ExecResult,
    FileEvent,
    FileStat,
    Usage,
)
from hadal.sandbox.specs import ContainerSpec, FunctionSpec, MicroVMSpec, Mount, VMSpec
from hadal.sandbox.sync import Console, Files, Keyboard, Mouse, Process, Sandbox

__all__ = [
    "AsyncProcess",
    "AsyncSandbox",
    "BoxInfo",
    "CallResult",
    "Change",
    "Console",
    "ContainerSpec",
    "Difference",
    "Event",
    "ExecResult",
    "FileEvent",
    "FileStat",
    "Files",
    "FunctionSpec",
    "Keyboard",
    "MicroVMSpec",
    "Mount",
    "Mouse",
    "NetworkPolicy",
    "Process",
    "ReplayReport",
    "Sandbox",
    "Usage",
    "VMSpec",
]
