"""Messages to text to ids and back: the format of DeepSeek-V4, usable with any engine."""

from hadal.encoding.encoding import Encoding, Prompt
from hadal.encoding.generations import GENERATIONS, detect_generation, note_generation
from hadal.encoding.grammar import Grammar
from hadal.encoding.parser import Parser
from hadal.encoding.tokenizer import Tokenizer
from hadal.encoding.validation import CallFault, check_call

__all__ = [
    "GENERATIONS",
    "CallFault",
    "Encoding",
    "Grammar",
    "Parser",
    "Prompt",
    "Tokenizer",
    "check_call",
    "detect_generation",
    "note_generation",
]
