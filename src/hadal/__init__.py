"""hadal: the open stack for long-running agents on DeepSeek-V4.

Import the part that you need: `hadal.config`, `hadal.model`, `hadal.checkpoint`, `hadal.cost`.
Importing `hadal` itself loads nothing. ARCHITECTURE.md says where everything is.
"""

__version__ = "0.1.0"
