"""Options of the APIs as parameters of the engine. Every option is used, refused, or known to be inert."""

from collections.abc import Mapping
from typing import Any, Final

from hadal.errors import InvalidConversationError

__all__ = [
    "chat_sampling",
    "completion_sampling",
    "messages_sampling",
    "responses_sampling",
    "seeded",
]

_SAME: Final = (
    "temperature top_p top_k min_p min_tokens stop_token_ids ignore_eos seed presence_penalty "
    "frequency_penalty repetition_penalty"
).split()


def _shared(options: Mapping[str, Any]) -> dict[str, Any]:
    sampling = {name: options[name] for name in _SAME if options.get(name) is not None}
    stop = options.get("stop")
    if stop is not None:
        sampling["stop"] = [stop] if isinstance(stop, str) else stop
    bias = options.get("logit_bias")
    if bias is not None:
        sampling["logit_bias"] = _bias(bias)
    return sampling


def seeded(sampling: dict[str, Any], index: int) -> dict[str, Any]:
    """Give each of several choices a seed of its own."""
    seed = sampling.get("seed")
    return sampling if seed is None or not index else sampling | {"seed": seed + index}


def _bias(value: Mapping[str, float]) -> dict[int, float]:
    if not all(key.isascii() and key.isdigit() for key in value):
        raise InvalidConversationError("expected token ids with numbers", where="logit_bias")
    return {int(key): number for key, number in value.items()}


def chat_sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """Read the options of a chat completion.

    Raises:
        InvalidConversationError: An option of a wrong type, or two that contradict each other.
    """
    sampling = _shared(options)
    limits = [options.get("max_completion_tokens"), options.get("max_tokens")]
    given = [limit for limit in limits if limit is not None]
    if given:
        sampling["max_tokens"] = given[0]
    top = options.get("top_logprobs")
    if options.get("logprobs"):
        sampling["logprobs"] = top or 0
    elif top:
        raise InvalidConversationError("needs logprobs to be true", where="top_logprobs")
    return sampling


def completion_sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """Read the options of a completion: 16 tokens unless it says otherwise, as the API has it."""
    sampling = _shared(options)
    sampling["max_tokens"] = 16 if options.get("max_tokens") is None else options["max_tokens"]
    if options.get("logprobs") is not None:
        sampling["logprobs"] = options["logprobs"]
        if options.get("echo"):
            sampling["prompt_logprobs"] = options["logprobs"]
    if options.get("prompt_logprobs") is not None:
        sampling["prompt_logprobs"] = options["prompt_logprobs"]
    return sampling


def messages_sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """Read the options of the Anthropic Messages API."""
    sampling = {
        name: options[name]
        for name in ("temperature", "top_k", "top_p", "max_tokens")
        if options.get(name) is not None
    }
    if options.get("stop_sequences"):
        sampling["stop"] = options["stop_sequences"]
    if "max_tokens" not in sampling:
        raise InvalidConversationError("is required", where="max_tokens")
    return sampling


def responses_sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """Read the options of the Responses API."""
    sampling = {
        name: options[name] for name in ("temperature", "top_p") if options.get(name) is not None
    }
    if options.get("max_output_tokens") is not None:
        sampling["max_tokens"] = options["max_output_tokens"]
    include = options.get("include") or []
    if "message.output_text.logprobs" in include:
        sampling["logprobs"] = options.get("top_logprobs") or 0
    return sampling
