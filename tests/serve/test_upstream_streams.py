"""What another server sends: whole or cut off, by ids or by text, with a window of its own."""

import asyncio
import random
from contextlib import aclosing

import httpx
import pytest

from hadal.backends.backend import Chunk, Ended, Generation
from hadal.backends.text_pieces import TextPieces
from hadal.backends.upstream_backend import UpstreamBackend
from hadal.encoding.tokens import DSML, EOS, THINK_END
from hadal.errors import UpstreamError, UpstreamRefusedError
from hadal.serve import Front
from hadal.serve.metrics import MeteredBackend
from tests.golden.data import tokenizer
from tests.serve.fake_upstream import DONE, ended, said, upstream
from tests.serve.fixtures import encoding, serving

CUT_OFF = "closed a stream before"
QUESTION = {"messages": [{"role": "user", "content": "Hello."}]}


def generated(fake, *, ready=False, **settings):
    """The events of one completion, and the error that broke it off."""

    async def whole():
        backend = UpstreamBackend(fake.url, tokenizer(), **settings)
        events, error = [], None
        generation = Generation(prompt_ids=[0, 1], sampling={})
        try:
            if ready:
                await backend.ready()
            async with backend.generate(generation) as stream, aclosing(stream):
                async for event in stream:
                    events.append(event)  # noqa: PERF401 - those before an error count, too
        except UpstreamError as err:
            error = err
        await backend.close()
        return events, error, backend

    return asyncio.run(whole())


def ids_and_text(events):
    chunks = [event for event in events if isinstance(event, Chunk)]
    ids = [token for chunk in chunks for token in chunk.token_ids]
    return ids, b"".join(chunk.data for chunk in chunks).decode()


# --- the end of a stream ---


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        ([ended(), DONE], "stop"),
        ([ended("length"), DONE], "length"),
        ([ended("length")], "length"),  # whoever gives a reason need not say that it is done
        ([DONE], "stop"),
    ],
)
def test_a_stream_that_is_whole(last, reason):
    with upstream([said("Yes."), *last]) as fake:
        events, error, _ = generated(fake)
    assert error is None
    assert ids_and_text(events)[1] == "Yes."
    assert events[-1] == Ended(reason=reason)


@pytest.mark.parametrize("last", [[], ['{"choices": [{"te']])
def test_a_stream_that_is_cut_off_is_an_error_to_try_again(last):
    with upstream([said("Yes,"), said(" </thi"), *last]) as fake:
        events, error, _ = generated(fake)
    assert error is not None
    assert error.retryable
    assert not any(isinstance(event, Ended) for event in events)
    # What may have been half a control token is asked for again with the rest.
    assert ids_and_text(events)[1] == "Yes,"


ROUTES = {
    "/v1/chat/completions": QUESTION,
    "/v1/completions": {"prompt": "Hello."},
    "/v1/responses": {"input": "Hello."},
    "/v1/messages": QUESTION | {"max_tokens": 100},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_clients_of_the_front_are_told_of_a_stream_that_is_cut_off(route, stream):
    with upstream([said("Well"), said(", it is")]) as fake:
        front = Front("hadal", encoding(), UpstreamBackend(fake.url, encoding().tokenizer))
        with serving(front) as url:
            ask = ROUTES[route] | {"model": "hadal", "stream": stream}
            reply = httpx.post(f"{url}{route}", json=ask, timeout=30)
    assert CUT_OFF in reply.text
    assert reply.status_code == (200 if stream else 502)
    assert '"finish_reason":"' not in reply.text
    assert "response.completed" not in reply.text
    assert "message_stop" not in reply.text


def test_lines_end_where_events_have_them():
    """httpx takes these for ends of lines, too, and they may stand in a JSON text as they are."""
    text = "one\u2028two\u2029three\x85four\x1cfive"
    escaped = '{"choices": [{"text": "' + text.replace("\x1c", "\\u001c") + '"}]}'
    with upstream([escaped, ended(), DONE]) as fake:
        events, error, _ = generated(fake)
    assert error is None
    assert ids_and_text(events)[1] == text


# --- text without ids ---


@pytest.mark.parametrize(
    ("pieces", "control"),
    [
        (["Hm. </thi", "nk>Yes."], [THINK_END]),
        (list(f"Hm.{THINK_END}<{DSML}tool_calls>{EOS}"), [THINK_END, DSML, EOS]),
        (["a < b </think", "er>"], []),
        (["<｜/table>｜", "DSML｜"], ["<｜/table>｜"]),  # the end of one begins another
        (["a <"], []),
        (["a </thi"], []),
    ],
)
def test_control_tokens_that_are_cut_by_pieces(pieces, control):
    with upstream([*map(said, pieces), ended(), DONE]) as fake:
        events, error, _ = generated(fake)
    assert error is None
    assert isinstance(events[-1], Ended)
    ids, text = ids_and_text(events)
    assert text == "".join(pieces)
    assert [tokenizer().decode([i]) for i in ids if i in tokenizer().added.values()] == control
    assert tokenizer().decode(ids) == text


def test_pieces_wait_only_while_they_may_become_a_control_token():
    """What does not become one is encoded piece by piece: each is likely a token that the model said."""
    pieces = TextPieces(tokenizer())
    assert [chunk.data for chunk in pieces.add("a")] == [b"a"]
    assert pieces.add(" <") == pieces.add("/") == []
    [chunk] = pieces.add("b")
    assert chunk.data == b" </b"
    assert list(chunk.token_ids) == [
        i for piece in (" <", "/", "b") for i in tokenizer().encode_text(piece)
    ]
    assert chunk.token_ids != tuple(tokenizer().encode_text(" </b"))
    assert pieces.rest() == []


def test_any_cut_gives_the_control_tokens_of_the_whole():
    """Some begin as others end; all spellings, in any order and cut anywhere."""
    chance = random.Random(0)
    spelled = [t for t in tokenizer().added if "holder" not in t]
    control = set(tokenizer().added.values())
    for _ in range(60):
        whole = "".join(chance.choices([*spelled, "<", "</", "x", "\n"], k=6))
        pieces, ids, left = TextPieces(tokenizer()), [], whole
        while left:
            size = chance.randint(1, 9)
            ids += [i for chunk in pieces.add(left[:size]) for i in chunk.token_ids]
            left = left[size:]
        ids += [i for chunk in pieces.rest() for i in chunk.token_ids]
        assert tokenizer().decode(ids) == whole
        expected = [i for i in tokenizer().encode_raw(whole) if i in control]
        assert [i for i in ids if i in control] == expected, whole


def test_ids_come_after_text_that_was_kept():
    [end] = tokenizer().encode_raw(THINK_END)
    with upstream([said("a <"), said("", token_ids=[end]), ended(), DONE]) as fake:
        events, _, _ = generated(fake)
    assert ids_and_text(events) == ([*tokenizer().encode_text("a <"), end], f"a <{THINK_END}")


# --- the window ---


@pytest.mark.parametrize("model", [None, "second"])
def test_the_window_is_known_when_it_is_ready(model):
    listed = ({"id": "first", "max_model_len": 8192}, {"id": "second", "max_model_len": 16384})
    with upstream([DONE], [DONE], listed=listed) as fake:
        _, _, backend = generated(fake, ready=True, model=model)
        assert backend.max_model_len == (8192 if model is None else 16384)
        assert fake.num_lists == 1
        generated(fake, model=model)
        assert fake.num_lists == 2
    for asked in fake.asked:  # without `ready`, too
        assert asked["max_tokens"] == backend.max_model_len - 2
        assert asked["model"] == backend.model


def test_what_is_given_is_not_asked_for():
    with upstream([DONE], listed=None) as fake:
        _, error, backend = generated(fake, ready=True, model="mine", max_model_len=1000)
        assert (error, backend.max_model_len, fake.num_lists) == (None, 1000, 0)
    listed = ({"id": "first", "max_model_len": 8192},)
    with upstream([DONE], listed=listed) as fake:
        _, error, backend = generated(fake, ready=True, max_model_len=1000)
        assert (error, backend.max_model_len, backend.model) == (None, 1000, "first")


@pytest.mark.parametrize("listed", [None, (), ({"id": "other", "max_model_len": 8192},)])
def test_a_model_that_is_named_need_not_be_listed(listed):
    with upstream([DONE], listed=listed) as fake:
        _, error, backend = generated(fake, ready=True, model="mine")
    assert error is None
    assert fake.asked[0]["model"] == "mine"
    assert backend.max_model_len == 1 << 20


@pytest.mark.parametrize("listed", [None, ()])
def test_without_a_list_and_a_name_there_is_no_model(listed):
    with upstream(listed=listed) as fake:
        error = generated(fake, ready=True)[1]
    assert isinstance(error, UpstreamRefusedError)


@pytest.mark.parametrize("listed", ["ab", ({"name": "x"},)])
def test_a_list_that_is_none(listed):
    with upstream(listed=listed) as fake:
        error = generated(fake, ready=True)[1]
    assert error is not None
    assert "/v1/models" in str(error)


def test_ready_fails_as_generating_does_and_can_be_tried_again():
    async def tried():
        with upstream() as fake:
            url = fake.url
        backend = UpstreamBackend(url, tokenizer())
        with pytest.raises(UpstreamError) as asked:
            await backend.ready()
        with pytest.raises(UpstreamError) as generating:
            async with backend.generate(Generation(prompt_ids=[0], sampling={})):
                pass
        assert str(asked.value) == str(generating.value)
        assert asked.value.retryable
        await backend.close()

    asyncio.run(tried())


def test_the_front_passes_it_on():
    async def passed():
        listed = ({"id": "model", "max_model_len": 16384},)
        with upstream(listed=listed) as fake:
            metered = MeteredBackend(UpstreamBackend(fake.url, tokenizer()), "model")
            await metered.ready()
            assert metered.max_model_len == 16384
            await metered.close()

    asyncio.run(passed())
