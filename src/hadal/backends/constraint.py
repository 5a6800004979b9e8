"""Calls held to their grammar by xgrammar, on the engine's logits-mask seam.

Nothing is masked while the model reasons, but that a call cannot begin there; from the end of the
reasoning on, text is free until a block of calls opens, and the block follows the grammar.
"""

from collections.abc import Callable
from typing import Any

import xgrammar
from torch import Tensor

from hadal.backends.backend import CallGrammar
from hadal.encoding import Tokenizer
from hadal.encoding.tokens import DSML
from hadal.errors import EngineError

__all__ = ["GrammarCompiler"]


class GrammarCompiler:
    """Compiles grammars for one vocabulary; keeps those it has compiled.

    Args:
        tokenizer: Whose tokens they are.
        vocab_size: Of the model's logits.
        eos_token_id: Ends a completion.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        vocabulary = [tokenizer.bytes_or_none(i) or b"" for i in range(vocab_size)]
        info = xgrammar.TokenizerInfo(
            vocabulary, vocab_size=vocab_size, stop_token_ids=[eos_token_id]
        )
        self._compiler = xgrammar.GrammarCompiler(info)
        self._vocab_size = vocab_size
        self._call_token = tokenizer.added.get(DSML)

    def __call__(self, grammar: CallGrammar) -> Callable[[], "GrammarConstraint"]:
        """Return what makes the constraint of a fresh completion."""
        compiled = self._compiler.compile_structural_tag(grammar.structural_tag)
        return lambda: GrammarConstraint(
            xgrammar.GrammarMatcher(compiled), grammar, self._vocab_size, self._call_token
        )


class GrammarConstraint:
    """The state of one completion in its grammar: an `hadal.engine.Constraint`."""

    def __init__(
        self, matcher: Any, grammar: CallGrammar, vocab_size: int, call_token: int | None
    ) -> None:
        self._matcher = matcher
        self._waiting_for = grammar.after
        self._call_token = call_token
        self._bitmask = xgrammar.allocate_token_bitmask(1, vocab_size)

    def mask(self, logits_V: Tensor) -> Tensor:
        """Return logits in which every token that may not come next is -inf."""
        logits_V = logits_V.clone()
        if self._waiting_for is not None:
            if self._call_token is not None:
                logits_V[self._call_token] = float("-inf")
        elif not self._matcher.is_terminated():
            self._matcher.fill_next_token_bitmask(self._bitmask)
            bitmask = self._bitmask.to(logits_V.device)
            xgrammar.apply_token_bitmask_inplace(logits_V.unsqueeze(0), bitmask)
        return logits_V

    def accept(self, token_id: int) -> None:
        """Take note of the next token.

        Raises:
            EngineError: The grammar does not allow it, so that `mask` was not used.
        """
        if self._waiting_for is not None:
            if token_id == self._waiting_for:
                self._waiting_for = None
        elif not self._matcher.is_terminated() and not self._matcher.accept_token(token_id):
            raise EngineError(f"token {token_id} breaks the grammar of calls")
