"""The llama.cpp side of a comparison, for another environment: `python llama_cpp_side.py GGUF THREADS`.

It needs llama-cpp-python and numpy and nothing of hadal; `side.py` is the other end of the pipe. Beside
the requests of `side.serve` it takes these, for prefixes and for the check of logits:

    {"keep": ids}             computes a prompt and keeps its state in memory
    {"resume": ids}           restores that state and computes what the prompt has beyond it
    {"logits": ids, "file"}   writes the float32 logits of every token
"""

import ctypes
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["LlamaSide", "main"]

_CHUNK = 512
"""Tokens of one call, as in `llama-bench -ub 512`."""
_WARM_UP = 256


class LlamaSide:
    """One network and at most one context."""

    def __init__(self, path: str, threads: int) -> None:
        self.api: Any = importlib.import_module("llama_cpp.llama_cpp")
        self._numpy: Any = importlib.import_module("numpy")
        self._threads = threads
        self.api.llama_backend_init()
        params = self.api.llama_model_default_params()
        params.use_mmap = False  # weights must be resident before anything is measured
        self._model = self.api.llama_model_load_from_file(path.encode(), params)
        if not self._model:
            sys.exit(f"llama.cpp cannot load {path}")
        vocab = self.api.llama_model_get_vocab(self._model)
        self._vocab_size = self.api.llama_vocab_n_tokens(vocab)
        self._context: Any = None
        self._done = 0
        self._pending: list[int] = []

    def start(self, ids: list[int], new: int) -> None:
        """Take a prompt."""
        self._open(len(ids) + new)
        self._pending, self._done = list(ids), 0

    def step(self) -> tuple[int, int | None]:
        """Compute a chunk, or the token chosen last."""
        piece, self._pending = self._pending[:_CHUNK], self._pending[_CHUNK:]
        self._decode(piece, all_logits=False)
        if self._pending:
            return self._done, None
        token = int(self._logits(len(piece) - 1).argmax())
        self._pending = [token]
        return self._done, token

    def keep(self, ids: list[int]) -> tuple[dict[str, float], Any]:
        """Compute a prompt; return the seconds and its state."""
        self.start(ids, 1)
        begin = _clocks()
        self._finish()
        seconds = _since(begin)
        size = self.api.llama_state_seq_get_size(self._context, 0)
        state = (ctypes.c_uint8 * size)()
        if self.api.llama_state_seq_get_data(self._context, state, size, 0) != size:
            sys.exit("llama.cpp cannot save its state")
        return seconds, state

    def resume(self, state: Any, kept: int, ids: list[int]) -> dict[str, float]:
        """Restore a state into an empty context and compute the rest; return the seconds."""
        self._open(len(ids) + 1)
        begin = _clocks()
        if self.api.llama_state_seq_set_data(self._context, state, len(state), 0) == 0:
            sys.exit("llama.cpp cannot restore its state")
        self._pending, self._done = ids[kept:], kept
        self._finish()
        return _since(begin)

    def logits(self, ids: list[int]) -> Any:
        """Return the logits of every token, [tokens, vocabulary]."""
        self.start(ids, 1)
        rows: list[Any] = []
        while self._pending:
            piece, self._pending = self._pending[:_CHUNK], self._pending[_CHUNK:]
            self._decode(piece, all_logits=True)
            rows += [self._logits(i).copy() for i in range(len(piece))]
        return self._numpy.stack(rows)

    def last_logits(self) -> list[float]:
        """Return those of the last token."""
        return self._logits(-1).tolist()

    def _finish(self) -> None:
        while self.step()[1] is None:
            pass

    def _open(self, tokens: int) -> None:
        if self._context is not None:
            self.api.llama_free(self._context)
        params = self.api.llama_context_default_params()
        params.n_ctx = -(-tokens // 256) * 256
        params.n_batch = params.n_ubatch = _CHUNK
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type = 1
        self._context = self.api.llama_init_from_model(self._model, params)
        if not self._context:
            sys.exit(f"llama.cpp cannot make a context of {tokens} tokens")

    def _decode(self, piece: list[int], *, all_logits: bool) -> None:
        batch = self.api.llama_batch_init(len(piece), 0, 1)
        batch.n_tokens = len(piece)
        for i, token in enumerate(piece):
            batch.token[i], batch.pos[i] = token, self._done + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = all_logits or i == len(piece) - 1
        code = self.api.llama_decode(self._context, batch)
        self.api.llama_batch_free(batch)
        if code:
            sys.exit(f"llama_decode returned {code}")
        self._done += len(piece)

    def _logits(self, row: int) -> Any:
        found = self.api.llama_get_logits_ith(self._context, row)
        return self._numpy.ctypeslib.as_array(found, (self._vocab_size,))


def _clocks() -> dict[str, float]:
    return {"wall": time.perf_counter(), "cpu": time.process_time()}


def _since(begin: dict[str, float]) -> dict[str, float]:
    return {clock: now - begin[clock] for clock, now in _clocks().items()}


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def main() -> None:
    """Answer the parent until it closes the pipe."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    side = LlamaSide(sys.argv[1], int(sys.argv[2]))
    side.start([i + 2 for i in range(_WARM_UP)], 2)
    side.step()
    side.step()
    ctypes.CDLL(None).malloc_trim(0)
    resident = _status_bytes("VmRSS")
    answer({"resident": resident})
    state, kept = None, 0
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            side.start(request["start"], request["new"])
            answer({})
        elif "keep" in request:
            kept = len(request["keep"])
            seconds, state = side.keep(request["keep"])
            answer(seconds | {"bytes": len(state), "logits": side.last_logits()})
        elif "resume" in request:
            seconds = side.resume(state, kept, request["resume"])
            answer(seconds | {"logits": side.last_logits()})
        elif "logits" in request:
            side.logits(request["logits"]).tofile(request["file"])
            answer({})
        else:
            begin = _clocks()
            done, token = side.step()
            peak = _status_bytes("VmHWM") - resident
            answer(_since(begin) | {"done": done, "token": token, "peak": peak})


if __name__ == "__main__":
    main()
