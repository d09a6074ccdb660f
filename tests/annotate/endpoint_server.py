"""An OpenAI-compatible endpoint on this machine that replies as a test wants."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Reply:
    """``content`` becomes a chat completion; ``body`` is sent as it is."""

    content: str | None = None
    status: int = 200
    body: str | None = None
    tokens: int | None = 100
    headers: dict[str, str] = field(default_factory=dict)


class EndpointServer:
    """Attributes: ``requests``, bodies in the order in which they came; ``keys``; ``most_at_once``."""

    def __init__(self, reply: Callable[[dict, int], Reply]):
        self.reply = reply
        self.requests: list[dict] = []
        self.keys: list[str | None] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.answer(self)

            def log_message(self, *words):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self.keys.append(handler.headers.get("Authorization"))
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        reply = self.reply(request, number)
        with self._lock:
            self._now -= 1
        body = reply.body
        if body is None:
            content: dict = {"choices": [{"message": {"role": "assistant", "content": reply.content}}]}
            if reply.tokens is not None:
                content["usage"] = {"total_tokens": reply.tokens}
            body = json.dumps(content)
        data = body.encode()
        try:
            handler.send_response(reply.status)
            for name, value in reply.headers.items():
                handler.send_header(name, value)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)
        except OSError:
            pass  # who asked has gone

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
