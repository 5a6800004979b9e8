"""Tools: what a model may call, and what it is told afterwards.

`Toolbox` takes a call as the model wrote it and always answers with text for the model: a failed command,
an unknown tool and wrong arguments are answers too. `BashTool` and `EditorTool` are the two that
DeepSeek's own harness gives its agents; `PythonTool` runs Python in a box; `tool` makes one of a function. `FileWatch` sees what calls do to files, for people.
"""

from hadal.tools.bash import BashTool
from hadal.tools.editor import EditorTool
from hadal.tools.file_watch import FileWatch
from hadal.tools.function_tool import FunctionTool, tool
from hadal.tools.python import PythonTool
from hadal.tools.tool import FileDiff, RunningTool, ToolOutput, ToolUseError
from hadal.tools.toolbox import Toolbox

__all__ = [
    "BashTool",
    "EditorTool",
    "FileDiff",
    "FileWatch",
    "FunctionTool",
    "PythonTool",
    "RunningTool",
    "ToolOutput",
    "ToolUseError",
    "Toolbox",
    "tool",
]
