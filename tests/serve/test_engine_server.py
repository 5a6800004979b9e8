"""What only a real engine behind the server can show: grammar, hang-ups, limits, keys, drains."""

import asyncio
import json
import time

import httpx
import pytest

from tests.serve.fixtures import TOOLS, answer, encoding, engine_front, scripted, serving

QUESTION = {"model": "hadal", "messages": [{"role": "user", "content": "List the files. " * 90}]}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("thinks", [True, False])
def test_a_model_of_noise_cannot_make_a_malformed_call(seed, thinks):
    """A random network, held to the grammar: what it calls is valid, or cut off by the limit."""
    thinking = {"type": "enabled" if thinks else "disabled"}
    close = encoding().tokenizer.control_id("</think>")
    ask = QUESTION | {
        "tools": TOOLS,
        "tool_choice": "required",
        "thinking": thinking,
        "max_tokens": 150,
        "seed": seed,
        "logit_bias": {str(close): 12, "1": 4},  # so that it stops thinking, and stops
    }
    with serving(engine_front()) as url:
        reply = httpx.post(f"{url}/v1/chat/completions", json=ask, timeout=120).json()
    [choice] = reply["choices"]
    kinds = {p["kind"] for p in reply["hadal"].get("problems", ())}
    assert kinds <= {"truncated_call", "loose_whitespace", "control_token_in_text"}, reply
    for made in choice["message"].get("tool_calls") or ():
        assert json.loads(made["function"]["arguments"]).keys() == {"command"}
    if choice["finish_reason"] != "length":
        assert choice["finish_reason"] == "tool_calls"


def test_clients_that_hang_up_leave_nothing_behind():
    """A thousand of them, mid-stream, at random moments."""
    front = engine_front(max_num_seqs=16)
    engine = front.backend.engine

    async def hang_up(client, index):
        ask = QUESTION | {"stream": True, "max_tokens": 2000, "seed": index}
        try:
            async with client.stream("POST", "/v1/chat/completions", json=ask) as reply:
                count = 0
                async for _ in reply.aiter_lines():
                    count += 1
                    if count > index % 7:
                        return
        except httpx.ReadError:
            pass

    async def main(url):
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            for start in range(0, 1000, 50):
                await asyncio.gather(*(hang_up(client, start + i) for i in range(50)))
            whole = QUESTION | {"max_tokens": 20, "temperature": 0}
            return (await client.post("/v1/chat/completions", json=whole)).json()

    with serving(front) as url:
        after = asyncio.run(main(url))
        deadline = time.monotonic() + 30
        while engine.has_work and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not engine.has_work
        assert engine.cache.pool.use().held == 0
        metrics = httpx.get(f"{url}/metrics").text
    with serving(engine_front()) as url:
        ask = QUESTION | {"max_tokens": 20, "temperature": 0}
        alone = httpx.post(f"{url}/v1/chat/completions", json=ask, timeout=120).json()
    assert after["choices"] == alone["choices"]
    assert "vllm:num_requests_running" in metrics
    assert 'hadal:requests_abandoned_total{model_name="hadal"} 0.0' not in metrics


def test_what_the_prompt_cost_is_told():
    with serving(engine_front()) as url, httpx.Client(base_url=url, timeout=120) as client:
        replies = [
            client.post("/v1/chat/completions", json=QUESTION | {"max_tokens": 2}).json()
            for _ in range(2)
        ]
    cold, warm = (r["hadal"]["prefix"] for r in replies)
    assert cold["hit"] == 0
    assert warm["hit"] == warm["hit"] // 128 * 128 > 0
    assert replies[1]["usage"]["prompt_tokens_details"]["cached_tokens"] == warm["hit"]


@pytest.mark.parametrize("streamed", [True, False])
def test_stop_texts_are_cut_off_and_nothing_else(engine_url, streamed):
    """The text before is whole, also where a token ends within what might become a stop."""
    ask = {"prompt": "List the files.", "max_tokens": 30, "temperature": 0, "ignore_eos": True}

    def text_of(**more):
        if not streamed:
            reply = httpx.post(f"{engine_url}/v1/completions", json=ask | more, timeout=60).json()
            return reply["choices"][0]["text"], reply["choices"][0]["stop_reason"]
        said, body = "", ask | more | {"stream": True}
        with httpx.stream("POST", f"{engine_url}/v1/completions", json=body, timeout=60) as events:
            for line in events.iter_lines():
                if line.startswith("data: {"):
                    said += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        return said, None

    whole, _ = text_of()
    middle = whole[len(whole) // 2 : len(whole) // 2 + 5]
    said, stop = text_of(stop=["never", middle])
    assert said == whole[: whole.index(middle)]
    assert streamed or stop == middle
    assert text_of(stop=[whole[-3:] + "and more"])[0] == whole  # held back, then let go


def test_a_streamed_completion_says_what_a_whole_one_says(engine_url):
    """Text, ids, log-probabilities and the tokens so far."""
    ask = {"prompt": "List", "max_tokens": 12, "seed": 1, "logprobs": 2, "return_token_ids": True}
    url = f"{engine_url}/v1/completions"
    [whole] = httpx.post(url, json=ask, timeout=60).json()["choices"]
    pieces, counts = [], []
    body = ask | {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    with httpx.stream("POST", url, json=body, timeout=60) as events:
        for line in events.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                pieces += event["choices"]
                if "usage" in event:
                    counts.append(event["usage"]["completion_tokens"])
    assert "".join(p["text"] for p in pieces) == whole["text"]
    assert [i for p in pieces for i in p.get("token_ids", ())] == whole["token_ids"]
    scored = [p["logprobs"] for p in pieces if p["logprobs"]]
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        assert [v for s in scored for v in s[name]] == whole["logprobs"][name]
    assert counts == sorted(counts)
    assert counts[-1] == 12


def test_routed_experts_and_token_ids_for_trainers():
    ask = {
        "token_ids": [0, 5, 6, 7],
        "sampling_params": {"max_tokens": 3, "logprobs": 1, "temperature": 1.0, "seed": 1},
        "return_routed_experts": True,
    }
    with serving(engine_front()) as url:
        reply = httpx.post(f"{url}/inference/v1/generate", json=ask, timeout=60).json()
    [choice] = reply["choices"]
    assert len(choice["token_ids"]) == 3
    assert len(choice["logprobs"]["content"]) == 3
    assert [len(layers) for layers in choice["routed_experts"]] == [4] * 6
    assert reply["weight_version"] == "default"


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/chat/completions", b"{", 400, "not JSON"),
        ("/v1/chat/completions", b'{"messages": 3}', 400, "messages"),
        ("/v1/chat/completions", b'{"messages": []}', 400, ""),
        ("/v1/chat/completions", {**QUESTION, "temperature": -1}, 400, "temperature"),
        ("/v1/chat/completions", {**QUESTION, "n": 0}, 400, "n: Input should be greater"),
        ("/v1/chat/completions", {**QUESTION, "stop": 3}, 400, "stop"),
        ("/v1/chat/completions", {**QUESTION, "reasoning_effort": "huge"}, 400, "effort"),
        ("/v1/completions", {"prompt": []}, 400, "prompt"),
        ("/v1/completions", {"prompt": "a", "stream_options": "yes"}, 400, "stream_options"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "suffix"),
        ("/inference/v1/generate", {"token_ids": [5], "stream": True}, 400, "stream"),
        ("/inference/v1/generate", {"token_ids": [5], "cache_salt": "s"}, 400, "cache_salt"),
        ("/tokenize", {"prompt": ["a", "b"]}, 400, "prompt"),
        ("/v1/completions", {"prompt": [200_000]}, 400, "token ids"),
        ("/v1/completions", {"prompt": "a", "stopp": "b"}, 400, "stopp: is not a known field"),
        ("/v1/completions", {"prompt": [5] * 5000}, 400, "context too long"),
        ("/v1/messages", {"messages": QUESTION["messages"]}, 400, "max_tokens"),
        ("/nowhere", {}, 404, "POST /nowhere"),
        ("/v1/models", {}, 405, "POST /v1/models"),
        ("/tokenize", b"x" * 3_000_000, 413, "at most 2,000,000 bytes"),
    ],
)
def test_wrong_requests_get_the_right_status(engine_url, path, body, status, says):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = httpx.post(engine_url + path, content=content, timeout=60)
    assert reply.status_code == status, reply.text
    assert says in reply.json()["error"]["message"]


@pytest.fixture(scope="module")
def engine_url():
    with serving(engine_front(), max_body_bytes=2_000_000) as url:
        yield url


def test_keys():
    with serving(scripted(answer("Yes.")), api_keys=("one", "two")) as url:
        post = {"url": f"{url}/v1/chat/completions", "json": QUESTION}
        assert httpx.post(**post).status_code == 401
        assert httpx.post(**post, headers={"authorization": "Bearer three"}).status_code == 401
        assert httpx.post(**post, headers={"x-api-key": "two"}).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/v1/models").status_code == 401


def test_maximum_effort_needs_its_window():
    front = scripted(answer("Yes."), max_model_len=100_000)
    with serving(front) as url:
        ask = QUESTION | {"reasoning_effort": "max"}
        reply = httpx.post(f"{url}/v1/chat/completions", json=ask)
        assert reply.status_code == 400
        assert "384K" in reply.json()["error"]["message"]
        front.allow_small_window = True
        assert httpx.post(f"{url}/v1/chat/completions", json=ask).status_code == 200


def test_tokenize_and_back(engine_url):
    text = "Hello, <｜User｜>世界"
    reply = httpx.post(f"{engine_url}/tokenize", json={"prompt": text}).json()
    back = httpx.post(f"{engine_url}/detokenize", json={"tokens": reply["tokens"]}).json()
    assert back["prompt"] == "<｜begin▁of▁sentence｜>" + text
    chat = httpx.post(f"{engine_url}/tokenize", json=QUESTION).json()
    assert chat["count"] == len(chat["tokens"]) > 200
