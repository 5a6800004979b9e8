"""Messages to text to ids and back: the format of DeepSeek-V4, usable with any engine."""

from hadal.encoding.encoding import Encoding, Prompt
from hadal.encoding.generations import GENERATIONS, detect_generation
from hadal.encoding.tokenizer import Tokenizer

__all__ = ["GENERATIONS", "Encoding", "Prompt", "Tokenizer", "detect_generation"]
