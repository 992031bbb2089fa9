"""A server that speaks OpenAI's chat protocol on the loopback device, streams, and fails as it is told to.

    with FakeOpenAI(lambda picture, asked: html) as server:
        server.faults = {3: ["500", "reset"]}        # of the fourth page: its first two attempts fail
        Server(server.url, recipe)

A page is called `name(picture)`, by default the number of different pages before it. Its faults are taken from its list
in `faults`, one an attempt, and where it has none from `chance(name, attempt)`. Every request is kept in `asked`.
"""

import base64
import contextlib
import io
import json
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

STATUS = {"400": 400, "401": 401, "404": 404, "413": 413, "429": 429, "500": 500, "502": 502, "503": 503}
MESSAGES = {
    "context": (400, "This model's maximum context length is 2048 tokens. However, you requested 4996 tokens"),
    "field": (400, "Unrecognized request argument supplied: repetition_penalty"),
}


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def log_message(self, *arguments) -> None:
        pass

    def plain(self, status: int, content: object, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        fake = self.server.fake
        if fake.key and self.headers.get("Authorization") != f"Bearer {fake.key}":
            return self.plain(401, {"error": {"message": f"wrong key {self.headers.get('Authorization')}"}})
        if self.path != "/v1/models" or fake.models is None:
            return self.plain(404, {"detail": "Not Found"})
        cards = [{"id": name, "object": "model", "owned_by": fake.owner} for name in fake.models]
        return self.plain(200, {"object": "list", "data": cards})

    def do_POST(self) -> None:
        fake = self.server.fake
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fake.came(self.connection)
        picture = picture_of(asked)
        with fake.lock:
            name = fake.name(picture)
            fake.asked.append((name, asked))
            fake.attempts[name] += 1
            listed, attempt = fake.faults.get(name), fake.attempts[name]
        fault = (listed.pop(0) if listed else "") if listed is not None else fake.chance(name, attempt)
        with contextlib.suppress(ConnectionError, BrokenPipeError):
            self.answer(fake, fault, picture, asked)

    def answer(self, fake, fault: str, picture, asked: dict) -> None:
        if fault == "reset at once":
            return self.reset()
        if fault in MESSAGES:
            status, message = MESSAGES[fault]
            return self.plain(status, {"error": {"message": message, "type": "BadRequestError", "code": status}})
        if fault.partition(" ")[0] in STATUS:  # "429 0.5": with Retry-After
            status, _, wait = fault.partition(" ")
            return self.plain(
                STATUS[status],
                {"message": f"told to {fault} {self.headers.get('Authorization', '')}"},
                **({"Retry_After": wait} if wait else {}),
            )
        html, finish = fake.answer(picture, asked)
        if fault == "whole":
            choice = {"index": 0, "message": {"role": "assistant", "content": html}, "finish_reason": finish}
            return self.plain(200, {"choices": [choice], "usage": fake.usage(picture, asked, html)})
        if fault == "whole, not JSON":
            return self.plain(200, b"<html>Bad gateway")
        finish = "length" if fault == "length" else finish
        return self.stream(fake, fault, html, finish, fake.usage(picture, asked, html))

    def stream(self, fake, fault: str, html: str, finish: str, usage: dict) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        pieces = [html[start : start + fake.piece] for start in range(0, len(html), fake.piece)]
        middle = (len(pieces) + 1) // 2
        for number, piece in enumerate(["", *pieces]):  # the first carries the role, as vLLM's does
            delta = {"content": piece} if number else {"role": "assistant", "content": ""}
            self.event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            if number == middle and self.interrupt(fake, fault):
                return
            time.sleep(fake.pause_s)
        if fault == "no choices":
            return self.end()
        if fault != "no finish":
            self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        self.event({"choices": [], "usage": usage})
        self.event("[DONE]")
        self.end()

    def interrupt(self, fake, fault: str) -> bool:
        """Whether the answer ends here."""
        if fault == "reset":
            self.reset()
        elif fault == "truncated":  # as if it were the end
            self.end()
        elif fault == "not JSON":
            self.event('{"choices": [{"index"')
        elif fault == "error":
            self.event({"error": {"message": "EngineCore died", "code": 500}})
        elif fault == "refusal":
            self.event({"error": {"message": "the prompt is longer than the context", "code": 400}})
        elif fault == "silence":
            fake.silence.wait(10)
        elif fault == "comments":  # the connection is kept open, and nothing comes
            for _ in range(200):
                if not fake.silence.wait(0.05):
                    self.chunk(b": ping\n\n")
        else:
            return False
        self.close_connection = True
        return True

    def event(self, data: object) -> None:
        # As vLLM writes it: not ASCII alone, so that U+2028 stands there as itself.
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
        self.chunk(f"data: {text}\n\n".encode())

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def end(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def reset(self) -> None:
        self.close_connection = True
        cut(self.connection)


def cut(connection: socket.socket) -> None:
    """As a process that is killed leaves it: by a reset."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)  # wakes a thread that reads
        os.close(connection.detach())  # close() would wait for the file that a handler has made of it


def picture_of(asked: dict) -> Image.Image:
    """The screenshot of a request, which must be what comes first."""
    (message,) = asked["messages"]
    head, _, data = message["content"][0]["image_url"]["url"].partition(",")
    assert (message["role"], head) == ("user", "data:image/png;base64")
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


class Listening(ThreadingHTTPServer):
    daemon_threads, request_queue_size, block_on_close = True, 64, False

    def handle_error(self, request, address) -> None:  # a client that has gone is no news
        pass


class FakeOpenAI:
    def __init__(
        self,
        html: Callable[[Image.Image, dict], str | tuple[str, str]],  # or (text, finish_reason)
        name: Callable[[Image.Image], object] | None = None,
        chance: Callable[[object, int], str] = lambda name, attempt: "",
    ):
        self.html, self.chance, self.models, self.owner, self.key = html, chance, ["holo1"], "vllm", None
        self.name = name or self.number
        self.faults: dict[object, list[str]] = {}
        self.asked: list[tuple[object, dict]] = []
        self.attempts, self.known = Counter(), {}
        self.piece, self.pause_s, self.resized = 8, 0.0, 1.0
        self.lock, self.silence, self.connections = threading.Lock(), threading.Event(), set()
        self.port, self.http = 0, None

    def number(self, picture: Image.Image) -> int:
        return self.known.setdefault(picture.tobytes(), len(self.known))

    def answer(self, picture: Image.Image, asked: dict) -> tuple[str, str]:
        found = self.html(picture, asked)
        return (found, "stop") if isinstance(found, str) else found

    def usage(self, picture: Image.Image, asked: dict, html: str) -> dict:
        tokens = int(picture.width * picture.height * self.resized) // 28**2
        prompt = len(asked["messages"][0]["content"][1]["text"].split())
        return {"prompt_tokens": prompt + tokens, "completion_tokens": len(html) + 1}

    def came(self, connection: socket.socket) -> None:
        with self.lock:
            self.connections.add(connection)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.http = Listening(("127.0.0.1", self.port), Handler)  # the same port when it comes back
        self.http.fake, self.port = self, self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def die(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        with self.lock:
            connections, self.connections = self.connections, set()
        for connection in connections:
            cut(connection)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *unused) -> None:
        self.silence.set()
        self.die()
