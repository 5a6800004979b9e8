"""Another server's completions endpoint, which answers what a test says, right or wrong."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DONE = "[DONE]"


def said(text, **more):
    """An event with a piece of text, as servers without `token_ids` send it."""
    return {"choices": [{"index": 0, "text": text, "finish_reason": None} | more]}


def ended(reason="stop"):
    return said("", finish_reason=reason)


class FakeUpstream:
    """Plays replies one after another: lists of events, or a status and a body.

    Attributes:
        url: Its root.
        listed: What `/v1/models` lists; None: it has no such route.
        asked: Bodies of the requests for completions.
        num_lists: Requests for the list.
    """

    def __init__(self, *replies, listed=({"id": "model"},)):
        self.replies = list(replies)
        self.listed = listed
        self.asked = []
        self.num_lists = 0
        self.url = ""

    def models(self):
        self.num_lists += 1
        if self.listed is None:
            return 404, b"no such route"
        return 200, json.dumps({"data": list(self.listed)}).encode()

    def completion(self, body):
        self.asked.append(json.loads(body))
        reply = self.replies.pop(0)
        if isinstance(reply, tuple):
            return reply
        events = [e if isinstance(e, str) else json.dumps(e, ensure_ascii=False) for e in reply]
        return 200, "".join(f"data: {event}\n\n" for event in events).encode()


@contextlib.contextmanager
def upstream(*replies, **settings):
    """Run one on a free port of the loopback. A reply ends with its connection, as HTTP/1.0 has it."""
    fake = FakeUpstream(*replies, **settings)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(*fake.models())

        def do_POST(self):
            length = int(self.headers["content-length"])
            self.answer(*fake.completion(self.rfile.read(length)))

        def answer(self, status, body):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        fake.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()
