"""`hadal serve`: the server, over a checkpoint or another server."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

from hadal.cli.listening import is_loopback, listen, run_app
from hadal.cli.local_names import LocalNames
from hadal.cli.quantities import parse_bytes
from hadal.errors import ConfigError

if TYPE_CHECKING:
    from hadal.encoding import Tokenizer
    from hadal.serve import Backend, Front, ServerConfig

__all__ = ["EngineOptions", "UpstreamOptions", "open_front", "serve"]

_Flag = Parameter(negative="")
_Bytes = Annotated[int, Parameter(converter=parse_bytes)]
_GRACE_S = 60
"""After SIGTERM, seconds that running requests have to end."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How the model runs.

    Attributes:
        device: Where the model runs, as torch names it.
        dtype: Of activations. Default: what the checkpoint has.
        tensor_parallel: Processes that divide the weights and the work among them.
        max_model_len: Longest prompt and completion together.
        max_num_seqs: Requests that are worked on at a time.
        max_num_batched_tokens: Tokens of one step.
        cache: Memory for compressed entries, as 8GiB. Default: a quarter of what is free.
        disk: Folder that keeps prefixes beyond memory and restarts.
        disk_size: What it may take.
        drafts: Tokens that multi-token prediction proposes.
        step_log: File that records every step, prompts included, for `hadal replay`.
    """

    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    tensor_parallel: int = 1
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 2048
    cache: _Bytes | None = None
    disk: Path | None = None
    disk_size: _Bytes = 16 << 30
    drafts: int = 0
    step_log: Path | None = None

    def backend(self, checkpoint: Path, tokenizer: "Tokenizer") -> "Backend":
        """Load a checkpoint and start its engine."""
        from hadal.backends.constraint import GrammarCompiler
        from hadal.engine import EngineConfig, open_engine
        from hadal.serve import EngineBackend

        config = EngineConfig(
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            cache_bytes=self.cache,
            disk_path=self.disk,
            disk_bytes=self.disk_size,
            num_speculative_tokens=self.drafts,
            tensor_parallel_size=self.tensor_parallel,
            step_log=self.step_log,
        )
        engine = open_engine(
            checkpoint,
            config,
            device=self.device,
            dtype=self.dtype,
            token_bytes=lambda i: tokenizer.bytes_or_none(i) or b"",
        )
        numbers = engine.model.config
        compiler = GrammarCompiler(tokenizer, numbers.vocab_size, numbers.eos_token_id)
        return EngineBackend(engine, tokenizer.decode_bytes, compile_grammar=compiler)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServedOptions:
    """How another server is asked that runs the model; its key is read from HADAL_UPSTREAM_KEY.

    Attributes:
        upstream_model: Name of the model there. Default: the first that it lists.
        upstream_takes: Whether it is sent token ids or text.
    """

    upstream_model: str | None = None
    upstream_takes: Literal["ids", "text"] = "ids"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class UpstreamOptions(ServedOptions):
    """Another server that runs the model; its key is read from HADAL_UPSTREAM_KEY.

    Attributes:
        upstream: URL of a server with a completions endpoint, to use instead of a checkpoint.
    """

    upstream: str | None = None

    def backend(self, tokenizer: "Tokenizer", max_model_len: int | None) -> "Backend":
        """Return the way to it."""
        from hadal.backends.upstream_backend import UpstreamBackend

        assert self.upstream is not None
        return UpstreamBackend(
            self.upstream,
            tokenizer,
            model=self.upstream_model,
            api_key=os.environ.get("HADAL_UPSTREAM_KEY"),
            send=self.upstream_takes,
            max_model_len=max_model_len,
        )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class FrontOptions:
    """What clients may do.

    Attributes:
        host: Address to listen on. One that others can reach needs a key.
        port: Port to listen on; 0 takes one that is free.
        name: Name that the model goes by. Default: that of the folder, or the upstream's.
        api_key: Keys that are let in; also from HADAL_API_KEYS.
        constrain_calls: Hold every call to its tool's grammar, not only where `strict` asks for it.
        allow_small_window: Accept maximum effort with less context than it is meant for.
        no_reasoning_memory: Do not put back reasoning that a client dropped.
        max_body: Largest request.
        max_concurrent: Requests at a time; more get 429.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    api_key: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    constrain_calls: Annotated[bool, _Flag] = False
    allow_small_window: Annotated[bool, _Flag] = False
    no_reasoning_memory: Annotated[bool, _Flag] = False
    max_body: _Bytes = 64 << 20
    max_concurrent: int = 1024

    def keys(self) -> tuple[str, ...]:
        """Return the keys; see that an address that others can reach has one."""
        named = os.environ.get("HADAL_API_KEYS", "").split(",")
        keys = (*self.api_key, *filter(None, named))
        _check_address(self.host, keys)
        return keys

    def limits(self, keys: tuple[str, ...]) -> "ServerConfig":
        """Return the server's limits."""
        from hadal.serve import ServerConfig

        return ServerConfig(
            api_keys=keys, max_body_bytes=self.max_body, max_concurrent=self.max_concurrent
        )


def serve(
    checkpoint: Path | None = None,
    *,
    tokenizer: Path | None = None,
    generation: Literal["v4", "v4-0731", "v4.1"] | None = None,
    engine: EngineOptions | None = None,
    upstream: UpstreamOptions | None = None,
    front: FrontOptions | None = None,
) -> None:
    """Serve a model to agents: chat, completions, messages, and token routes for trainers.

    Keys can also stand in HADAL_API_KEYS, separated by commas, and the upstream's in
    HADAL_UPSTREAM_KEY: a command line can be read by every user of a machine.

    Examples:
        hadal serve nano

        hadal serve path/to/checkpoint

        hadal serve path/to/checkpoint --disk /var/cache/hadal --drafts 1

        hadal serve --upstream http://gpu-box:8000 --tokenizer path/to/checkpoint

    Args:
        checkpoint: Folder with weights and tokenizer.json; or nano, which comes with hadal.
        tokenizer: Folder or tokenizer.json, if not the checkpoint's.
        generation: Of the message format. Default: read from the checkpoint.
        engine: How the model runs.
        upstream: Another server that runs it.
        front: What clients may do.
    """
    from hadal.serve import build_app

    options = front or FrontOptions()
    keys = options.keys()
    served = open_front(
        checkpoint, tokenizer, generation, engine or EngineOptions(), upstream or UpstreamOptions()
    )
    served.model = options.name or served.model
    served.memory = None if options.no_reasoning_memory else served.memory
    served.constrain_calls = options.constrain_calls
    served.allow_small_window = options.allow_small_window
    app = build_app(served, options.limits(keys))
    taken, url = listen(options.host, options.port)
    Console(stderr=True).print(f"serving {served.model} at {url}/v1", markup=False, soft_wrap=True)
    # With keys it may stand behind a proxy, which asks by any name; a web page has no key.
    guarded = app if keys else LocalNames(app)
    run_app(guarded, taken, ws="none", timeout_graceful_shutdown=_GRACE_S)


def open_front(
    checkpoint: Path | None,
    tokenizer: Path | None,
    generation: str | None,
    engine: EngineOptions,
    upstream: UpstreamOptions,
) -> "Front":
    """Return encoding and backend, of a checkpoint or another server.

    Raises:
        ConfigError: Neither is given, or both, or no tokenizer.
    """
    from hadal.encoding import Encoding, detect_generation
    from hadal.serve import Front

    if (checkpoint is None) == (upstream.upstream is None):
        raise ConfigError("expected a checkpoint or --upstream", hint="see --help for examples")
    checkpoint, tokenizer = _find(checkpoint), _find(tokenizer)
    source = tokenizer or checkpoint
    if source is None:
        raise ConfigError("--upstream needs --tokenizer", hint="the checkpoint's tokenizer.json")
    encoding = Encoding.load(generation or detect_generation(source), tokenizer=source)
    if checkpoint is not None:
        return Front(checkpoint.name, encoding, engine.backend(checkpoint, encoding.tokenizer))
    backend = upstream.backend(encoding.tokenizer, engine.max_model_len)
    return Front(upstream.upstream_model or "upstream", encoding, backend)


def _find(path: Path | None) -> Path | None:
    from hadal.nano import named_checkpoint

    return None if path is None else named_checkpoint(path)


def _check_address(host: str, keys: tuple[str, ...]) -> None:
    if not is_loopback(host) and not keys:
        raise ConfigError(
            f"{host} can be reached by others, and there is no API key",
            hint="set HADAL_API_KEYS or --api-key, or listen on 127.0.0.1",
        )
