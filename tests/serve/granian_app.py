"""The application that `test_granian.py` has served: two short answers, then two very long ones."""

from starlette.applications import Starlette

from hadal.serve import build_app
from tests.serve.fixtures import answer, scripted

__all__ = ["application"]


def application() -> Starlette:
    """Return it: one answer is read whole, one streamed, and nobody waits for the last two."""
    endless = answer("word " * 20_000)
    return build_app(scripted(answer("Done."), answer("Done."), endless, endless, delay_s=0.001))
