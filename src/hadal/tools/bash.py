"""`bash`: commands in a shell whose state lives from call to call.

The shell is not a process that waits. Every call is a command of its own in the box, which begins by
reading the state that the last one left (directory, variables, functions, aliases, options) and ends by
writing it: so each is journalled, limited and resumable by itself, and a killed one takes nothing along.
Of calls that run side by side, the one that ends last leaves its state.
"""

from dataclasses import dataclass
from typing import Any

from hadal.chat import Tool
from hadal.errors import CommandRefusedError
from hadal.sandbox import AsyncSandbox
from hadal.tools.cut import KEPT_BYTES, OUTPUT_BYTES, OUTPUT_FOLDER, command_output
from hadal.tools.tool import Said, ToolOutput, ToolUseError
from hadal.tools.watched_run import watched_run

__all__ = ["BashTool"]

_LINE = 'eval "$1"; eval "$__hadal_command"'
"""One line, so that messages of the shell name the lines of the model's command."""

_PREPARE = r"""
exec 2>&1
__hadal_command=$2
__hadal_state=@STATE@
set --
shopt -s expand_aliases
[[ -d ${__hadal_state%/*} ]] || mkdir -p -m 1777 -- "${__hadal_state%/*}"
__hadal_save() {
  local __hadal_code=$? __hadal_options __hadal_separators __hadal_name __hadal_new=$__hadal_state.new.$BASHPID
  trap - EXIT
  __hadal_options=$(set +o)
  set +eux
  __hadal_separators=$(declare -p IFS 2>/dev/null)
  local IFS=$' \t\n'
  {
    for __hadal_name in $(compgen -v); do
      case $__hadal_name in
        __hadal_*|BASH*|COMP_*|EPOCH*|_|DIRSTACK|FUNCNAME|GROUPS|HISTCMD|IFS|LINENO|OLDPWD|OPTIND|PIPESTATUS|PWD|RANDOM|SECONDS|SHLVL|SRANDOM) ;;
        *) [[ ${!__hadal_name@a} == *r* ]] || declare -p "$__hadal_name" ;;
      esac
    done
    for __hadal_name in $(compgen -A function); do
      [[ $__hadal_name == __hadal_* ]] || declare -f "$__hadal_name"
    done
    alias -p
    printf 'cd -- %q || cd /; OLDPWD=%q\n' "$PWD" "$OLDPWD"
    shopt -p
    printf '%s\n' "$__hadal_separators" "$__hadal_options"
  } >"$__hadal_new" 2>/dev/null && mv -f -- "$__hadal_new" "$__hadal_state"
  exit "$__hadal_code"
}
trap __hadal_save EXIT
if [[ -r $__hadal_state ]]; then . "$__hadal_state"; fi
"""


@dataclass
class BashTool:
    """A shell in a box.

    Attributes:
        box: Where.
        timeout_s: Of a call; then all that it started is killed.
        shown_bytes: Of an output.
        session: Two with different names have different directories and variables.
    """

    box: AsyncSandbox
    timeout_s: float = 300.0
    shown_bytes: int = OUTPUT_BYTES
    session: str = "main"

    @property
    def declaration(self) -> Tool:
        """Return name, description and schema."""
        return self.declare()

    @staticmethod
    def declare() -> Tool:
        """Return the same without a box."""
        return Tool.of(
            "bash",
            "Run a command in a shell. Directory and variables stay from call to call.",
            {
                "type": "object",
                "properties": {"command": {"type": "string"}},
                "required": ["command"],
                "additionalProperties": False,
            },
        )

    async def call(self, arguments: dict[str, Any], request_id: str, said: Said) -> ToolOutput:
        """Run a command; see `RunningTool.call`."""
        if "\0" in arguments["command"]:
            raise ToolUseError("the command has a zero byte, which no shell takes")
        prepare = _PREPARE.replace("@STATE@", f"{OUTPUT_FOLDER}/bash-{self.session}")
        argv = ("bash", "-c", _LINE, "bash", prepare, str(arguments["command"]))
        try:
            result = await watched_run(
                self.box, argv, said, request_id=request_id, timeout_s=self.timeout_s,
                output_limit=KEPT_BYTES,
            )  # fmt: skip
        except CommandRefusedError as error:
            raise ToolUseError(f"the command was not started: {error.message}") from error
        late = f"killed after {self.timeout_s:g} s; the shell is as it was before this command"
        return await command_output(self.box, result, self.shown_bytes, late=late)
