"""Options of the routes: names, types and what is fixed; the OpenAPI document is made from them.

Ranges are the engine's business (`SamplingParams`), so that one place decides them. A field that has
one possible value exists because clients send it, and is refused with any other.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, Field

from hadal.chat.wire import Reading, WireModel

__all__ = [
    "ChatOptions",
    "CompletionOptions",
    "DetokenizeOptions",
    "GenerateOptions",
    "MessagesOptions",
    "Options",
    "ResponsesOptions",
    "TokenizeOptions",
    "checked",
]

TokenIds = list[int]


class Options(WireModel):
    """Options of one route; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


OptionsT = TypeVar("OptionsT", bound=Options)


def checked(kind: type[OptionsT], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that have a value.

    Raises:
        InvalidConversationError: An unknown one, or one of a wrong type; all faults are listed.
    """
    return Reading("error").check(kind, given, "").model_dump(exclude_none=True)


class _StreamOptions(Options):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Sampling(Options):
    """What the engine is told; names are vLLM's."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    n: int | None = Field(None, ge=1, le=128)


class ChatOptions(_Sampling):
    """`/v1/chat/completions`, besides the conversation."""

    model: str | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    include_reasoning: bool | None = None
    return_token_ids: bool | None = None
    thinking: Any = None
    # what has no meaning here and changes no answer
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    prediction: Any = None
    modalities: Any = None
    verbosity: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None


class CompletionOptions(_Sampling):
    """`/v1/completions`."""

    model: str | None = None
    prompt: str | TokenIds | list[str] | list[TokenIds]
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    best_of: int | None = None
    suffix: Literal[""] | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    skip_special_tokens: Literal[False] | None = None
    spaces_between_special_tokens: Literal[False] | None = None
    user: Any = None


class _GenerateSampling(_Sampling):
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_routed_experts: bool | None = None
    # about the text, of which this route returns none
    detokenize: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None


class GenerateOptions(Options):
    """`/inference/v1/generate`."""

    model: str | None = None
    request_id: str | None = None
    token_ids: TokenIds | None = None
    prompt_token_ids: TokenIds | None = None
    sampling_params: _GenerateSampling | None = None
    return_routed_experts: bool | None = None
    stream: Literal[False] | None = None
    priority: Literal[0] | None = None


class TokenizeOptions(Options):
    """`/tokenize` of a text; a conversation is read as `/v1/chat/completions` reads it."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None


class DetokenizeOptions(Options):
    """`/detokenize`."""

    model: str | None = None
    tokens: TokenIds


class MessagesOptions(Options):
    """`/v1/messages`, besides the conversation."""

    model: str | None = None
    max_tokens: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    disable_parallel_tool_use: bool | None = None
    thinking: Any = None
    metadata: Any = None
    service_tier: Any = None
    inference_geo: Any = None
    speed: Any = None
    context_management: Any = None
    betas: Any = None


class ResponsesOptions(Options):
    """`/v1/responses`, besides the conversation."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    store: bool | None = None
    background: Literal[False] | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    truncation: str | None = None
    max_tool_calls: int | None = None
    reasoning: Any = None
    text: Any = None
    metadata: Any = None
    user: Any = None
    service_tier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    context_management: Any = None
