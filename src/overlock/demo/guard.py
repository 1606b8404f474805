"""What the browser may load: of this server alone."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Gradio's front end makes scripts and styles as it runs; data and blob are pictures that the page itself holds.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'; form-action 'self'; "
    "base-uri 'self'"
)
CARDS = re.compile(rb'<meta\s+(?:property|name)="(?:og|twitter):[^>]*>')
"""What sites that link here would show, with pictures from elsewhere."""


class Guard:
    """Middleware that forbids the browser every other server, and takes the links to such out of the page's head."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(send)
        await self.app(scope, receive, answer.send)


class _Answer:
    """An answer on its way; that of a page waits until it is whole."""

    def __init__(self, send: Send):
        self._send = send
        self._start: Message | None = None
        self._body = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            headers.append((b"referrer-policy", b"no-referrer"))
            message = {**message, "headers": headers}
            if any(name == b"content-type" and value.startswith(b"text/html") for name, value in headers):
                self._start = message
                return
        elif self._start is not None and message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if message.get("more_body"):
                return
            body = CARDS.sub(b"", self._body)
            headers = [(name, value) for name, value in self._start["headers"] if name != b"content-length"]
            headers.append((b"content-length", str(len(body)).encode()))
            await self._send({**self._start, "headers": headers})
            message = dict(type="http.response.body", body=body)
            self._start = None
        await self._send(message)
