"""The literal tags of DSML, by generation.

V4 writes `<｜DSML｜tool_calls>`, V4.1 `<｜DSML｜ calls>` with a space after the token. Nothing else of
the markup differs.
"""

from dataclasses import dataclass
from typing import Final

__all__ = ["DSML", "V4_TAGS", "V41_TAGS", "Tags"]

DSML: Final = "｜DSML｜"
"""Between `<` or `</` and the name of every tag; one token."""


@dataclass(frozen=True, slots=True)
class Tags:
    """Names of the three tags, and the literal strings that follow from them.

    Attributes:
        block: Wrapper of all calls of a turn.
        invoke: One call.
        parameter: One argument.
    """

    block: str
    invoke: str
    parameter: str

    @property
    def block_open(self) -> str:
        """Opens the wrapper."""
        return f"<{DSML}{self.block}>"

    @property
    def block_close(self) -> str:
        """Closes the wrapper."""
        return f"</{DSML}{self.block}>"

    @property
    def invoke_open_prefix(self) -> str:
        """Opens a call, up to the name."""
        return f'<{DSML}{self.invoke} name="'

    @property
    def invoke_close(self) -> str:
        """Closes a call."""
        return f"</{DSML}{self.invoke}>"

    @property
    def parameter_open_prefix(self) -> str:
        """Opens an argument, up to the key."""
        return f'<{DSML}{self.parameter} name="'

    @property
    def parameter_close(self) -> str:
        """Closes an argument."""
        return f"</{DSML}{self.parameter}>"


V4_TAGS: Final = Tags("tool_calls", "invoke", "parameter")
V41_TAGS: Final = Tags(" calls", " invoke", " parameter")
