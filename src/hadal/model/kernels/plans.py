"""Tables of the addresses of a module's matrices, so that one call of the library does the work of many modules.

A table is asked before every use whether it is still true: whether the module has the same parts, parameters and
buffers at the same places, and no hooks that a call past the parts would leave out. That takes 50 us a layer, a
tenth of a step of one token; whoever has a model to itself asks once, and says so (`unchanged`).
"""

import contextlib
from collections.abc import Callable, Generator, Sequence
from contextvars import ContextVar
from operator import is_

import torch
from torch import Tensor, nn

from hadal.model.kernels.native import library
from hadal.model.kernels.products import format_of
from hadal.model.kernels.switch import is_on

__all__ = ["Numbers", "addresses", "forget_tables", "matrix", "tables_of", "unchanged"]

_UNCHANGED: ContextVar[bool] = ContextVar("hadal_plans_unchanged", default=False)

Numbers = list[int]
"""What the library reads: addresses and sizes."""


def matrix(weight: Tensor, scale: Tensor | None) -> Numbers | None:
    """Return what describes a matrix; None if kernels do not take it as it is stored."""
    form = format_of(weight, scale)
    if form is None or weight.device.type != "cpu" or not weight.is_contiguous():
        return None
    inner = weight.shape[1] * (2 if weight.dtype == torch.int8 else 1)
    return [weight.data_ptr(), *addresses(scale), form, inner, weight.shape[0]]


def addresses(*tensors: Tensor | None) -> Numbers:
    """Return where tensors lie; 0 for None."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


class _Plan:
    """Tables of one module, and what they rest on."""

    def __init__(self, module: nn.Module, tables: Sequence[Numbers | None]) -> None:
        self.tables = [
            None if numbers is None else torch.tensor(numbers, dtype=torch.int64)
            for numbers in tables
        ]
        self._holders: list[dict[str, object]] = []
        self._names: list[str] = []
        self._values: list[object] = []
        self._hooks: list[object] = []
        for part in module.modules():
            members = part.__dict__
            for kind in ("_modules", "_parameters", "_buffers"):
                self._holders += [members[kind]] * len(members[kind])
                self._names += members[kind]
                self._values += members[kind].values()
            self._hooks += [members["_forward_hooks"], members["_forward_pre_hooks"]]
        self._tensors = [*module.parameters(), *module.buffers()]
        self._memory = [
            tensor.detach() for tensor in self._tensors
        ]  # not given back while it may be read
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    def holds(self) -> bool:
        """Return whether the module is what it was, without hooks. Loops of C: it is asked for every layer of a token."""
        return (
            all(map(is_, map(dict.get, self._holders, self._names), self._values))
            and not any(self._hooks)
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
        )

    def __deepcopy__(self, memo: object) -> None:
        """Leave a copy of the module to make its own."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Leave another process to make its own."""
        return type(None), ()


def tables_of(
    module: nn.Module, build: Callable[[], Sequence[Numbers | None]]
) -> list[Tensor | None] | None:
    """Return the tables of a module, made anew if it has changed; None where kernels cannot stand for its parts."""
    if torch.is_grad_enabled() or not is_on() or library() is None:
        return None
    plan = module.__dict__.get("_kernel_plan")
    if plan is None or not (_UNCHANGED.get() or plan.holds()):
        plan = _Plan(module, build())
        module.__dict__["_kernel_plan"] = plan
        if not plan.holds():  # hooks
            return None
    return plan.tables


def forget_tables(module: nn.Module) -> None:
    """Let go of the tables of a module and of its parts, which may be of what it was once."""
    for part in module.modules():
        part.__dict__.pop("_kernel_plan", None)


@contextlib.contextmanager
def unchanged() -> Generator[None]:
    """Run a block in which tables that there are hold: modules are what they were when they were asked last.

    Numbers may have been written into their parameters; other parameters or hooks are not seen.
    """
    token = _UNCHANGED.set(True)
    try:
        yield
    finally:
        _UNCHANGED.reset(token)
