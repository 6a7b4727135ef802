"""The process: a port, the models' threads, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Final

import uvicorn
from fastapi import FastAPI

from dnp.engine.errors import OutputError
from dnp.serving.engines import LocalEngine
from dnp.serving.logs import say
from dnp.serving.service import Service

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
TWICE: Final = 1.0  # seconds: supervisors send the same signal to a process and to its group


def bind(host: str, port: int, *, writer_seconds: float) -> socket.socket:
    """A socket on that address, not listening yet; port 0 is any free one. Raises OutputError when it cannot be had.

    Where the system can, a connection whose other side takes nothing for ``writer_seconds`` is ended by it.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise OutputError(f"there is no address {host!r} here ({error}); name another with --host") from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * writer_seconds))
        found.bind(address)
    except OSError as error:
        found.close()
        raise OutputError(
            f"cannot serve on {host}, port {port}: {error.strerror or error}; take another with --port, or --port 0 "
            "for any that is free"
        ) from error
    return found


class Server(uvicorn.Server):
    """uvicorn, which on SIGTERM or Ctrl-C refuses new work, finishes what there is, and only then closes its port.

    A second signal, a second later or more, ends it at once.

    Attributes:
        interrupted: whether work was cut off, by a second signal or because it took too long.
    """

    def __init__(self, app: FastAPI) -> None:
        settings = app.state.settings
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",  # which bounds the headers; httptools does not, and it and uvloop save 0.1 ms
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=1024,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=1,  # by then nothing is in flight, or it has had its time
            )
        )
        self._service: Service = app.state.service
        self._limit: float = settings.drain_seconds
        self._since = 0.0
        self.interrupted = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; the second time end at once."""
        now = time.monotonic()
        if not self._service.draining:
            self._service.draining, self._since = True, now
        elif now - self._since > TWICE:
            self.interrupted = self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is over."""
        if self._service.draining and not self.should_exit:
            late = time.monotonic() - self._since > self._limit
            if late or not self._service.active:
                self.interrupted = bool(self._service.active)
                self.should_exit = True
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """As uvicorn does, but the signals are not raised again afterwards: they were answered."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(
    app: FastAPI, listener: socket.socket, engines: Sequence[LocalEngine], ready: Callable[[], None] = lambda: None
) -> bool:
    """Serve until a signal comes; the models warm up meanwhile, after which ``ready`` is called.

    Returns whether all work was finished. Raises what warming up raises.
    """
    server = Server(app)
    failed: list[BaseException] = []

    def warm_up() -> None:
        try:
            for engine in engines:
                started = time.perf_counter()
                engine.warm_up()
                say("warm", model=engine.name, seconds=round(time.perf_counter() - started, 2))
            if not server.should_exit:
                ready()
        except BaseException as error:
            failed.append(error)
            server.should_exit = True

    warming = threading.Thread(target=warm_up, name="dnp-warm-up", daemon=True)
    with server.capture_signals():  # also when the loop has ended: supervisors repeat them
        try:
            warming.start()
            asyncio.run(server.serve(sockets=[listener]))
        finally:
            listener.close()
            for engine in engines:
                engine.close()  # which ends a warm-up
            warming.join()
    if failed and not app.state.service.draining:
        raise failed[0]
    return not server.interrupted
