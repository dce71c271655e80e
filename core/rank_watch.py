"""Notice within seconds that another rank has ended, and end this one with one message for all.

Rank 0 keeps a connection to every other rank. A rank that ends says there how; the operating system
closes the connection of one that is killed, and keep-alive probes that of a machine that is lost.
Without it, ranks that meet at one barrier would work on for hours, and NCCL waits for its time-out.

Why not heartbeats in torch's TCPStore: a client's call has no time-out where the store's host is
stopped or vanishes (`add` hung for all of 25 s, with a time-out of 5), and a thread that beats
pauses while another holds the interpreter's lock (13 s in `json.loads` of 80 MB on two busy cores),
so a live rank would be taken for dead. Here the system answers the probes.
"""

from __future__ import annotations

import os
import secrets
import selectors
import signal
import socket
import sys
import threading
from _thread import interrupt_main
from contextlib import suppress
from typing import TYPE_CHECKING

from sparsecast.core.interrupts import Terminated

if TYPE_CHECKING:  # builds of torch may lack it
    from torch.distributed.distributed_c10d import Store

GRACE = 15
"""Seconds after which a rank that does not end by itself, as in a call of NCCL, is ended."""
CONNECT = 60
"""Seconds for the connections of ranks that have all started."""
ENDED, TOLD, INTERRUPTED, TERMINATED, LOST = b".", b"!", b"i", b"t", b""
"""What a rank says when it ends: well, or as all have agreed; with a message; by a signal. A rank
that is killed says nothing."""
KEY = "sparsecast/watch"
PROBES = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


class RankLost(ConnectionError):
    """Another rank has ended without a message."""


class RankWatch:
    """The connections of one rank, read by a thread."""

    def __init__(self, store: Store, rank: int, size: int, local_rank: int) -> None:
        """Connect; every rank calls this.

        Args:
            store: Through which ranks find each other.
        """
        self._rank, self._size, self._local_rank = rank, size, local_rank
        self._connections = _accept(store, size) if rank == 0 else {0: _connect(store, rank)}
        self._news = threading.Event()
        self._end: tuple[int, bytes] | None = None
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._leaving = False
        threading.Thread(target=self._read, name="rank watch", daemon=True).start()

    def agree(self) -> None:
        """Note that every rank is about to end, and that none is to be asked why."""
        with self._lock:
            self._leaving = True
        self._say(ENDED)

    def explain(self, error: BaseException, connection_lost: bool) -> BaseException:
        """Return what to raise in place of `error`, with which this rank ends.

        Args:
            connection_lost: Whether it may come of another rank's end.
        """
        with self._lock:
            agreed, self._leaving = self._leaving, True
        if agreed:
            return error
        interrupted = isinstance(error, KeyboardInterrupt)
        if connection_lost or interrupted:
            self._news.wait(5 if connection_lost else 1)
        said = TOLD
        if interrupted:
            said = TERMINATED if isinstance(error, Terminated) else INTERRUPTED
        if self._end is None or not (connection_lost or interrupted):
            self._say(said)
            if connection_lost:
                return RankLost(f"rank {self._rank} lost its connection to another; {_left(error)}")
            return error
        rank, how = self._end
        self._say(TOLD)
        if how in (INTERRUPTED, TERMINATED):
            kind = Terminated if how == TERMINATED else KeyboardInterrupt
            return kind(_told(error))
        if how == TOLD or not self._tells(rank):
            return SystemExit(1)
        return RankLost(f"{_without_a_word(rank)}; {_left(error)}")

    def close(self) -> None:
        """End the thread and the connections."""
        with self._lock:
            self._leaving = True
        self._say(ENDED)
        self._closed.set()
        for connection in self._connections.values():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _say(self, how: bytes) -> None:
        for connection in list(self._connections.values()):
            with suppress(OSError):
                connection.sendall(how)

    def _tells(self, lost: int) -> bool:
        """Whether this rank tells of a lost one: rank 0, or in its place the first of a machine."""
        if lost != 0:
            return self._rank == 0
        return self._local_rank == (1 if self._rank == self._local_rank else 0)

    def _read(self) -> None:
        """Read until the first rank ends otherwise than well; then see that this one ends."""
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    said = LOST
                    with suppress(OSError):
                        said = key.fileobj.recv(1)  # type: ignore[union-attr]
                    if self._closed.is_set():
                        return
                    if said != ENDED:
                        self._bring_to_an_end(key.data, said)
                        return
                    selector.unregister(key.fileobj)

    def _bring_to_an_end(self, rank: int, how: bytes) -> None:
        self._end = rank, how
        self._news.set()
        with self._lock:
            if not self._leaving:
                handled = callable(signal.getsignal(signal.SIGINT))
                interrupt_main(signal.SIGINT if handled else signal.SIGTERM)
        if self._rank == 0:
            self._say(TOLD)
        if self._closed.wait(GRACE):
            return
        if how == LOST and self._tells(rank):
            sys.stderr.write(f"sparsecast: {_without_a_word(rank)}; {_left(None)}\n")
            sys.stderr.flush()
        os._exit(1)


def _without_a_word(rank: int) -> str:
    return f"rank {rank} has ended without a word, as one that is killed or runs out of memory"


def _told(error: BaseException | None) -> str:
    """Return what an interrupt has said of what is kept, which may stand behind other errors."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt) and str(error):
            return str(error)
        error = error.__cause__ or error.__context__
    return ""


def _left(error: BaseException | None) -> str:
    return _told(error) or "the same command goes on from what was finished"


def _accept(store: Store, size: int) -> dict[int, socket.socket]:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    token = secrets.token_bytes(16)
    found: dict[int, socket.socket] = {}
    with socket.create_server(
        ("", 0), family=family, backlog=size, dualstack_ipv6=family == socket.AF_INET6
    ) as server:
        server.settimeout(CONNECT)
        store.set(KEY, f"{server.getsockname()[1]} {token.hex()}")
        while len(found) < size - 1:
            connection, _ = server.accept()
            connection.settimeout(CONNECT)
            with suppress(OSError):
                hello = connection.recv(20, socket.MSG_WAITALL)
                if secrets.compare_digest(hello[:16], token):
                    found[int.from_bytes(hello[16:], "big")] = _kept_alive(connection)
    return found


def _connect(store: Store, rank: int) -> socket.socket:
    port, token = store.get(KEY).decode().split()
    connection = socket.create_connection((os.environ["MASTER_ADDR"], int(port)), CONNECT)
    connection.sendall(bytes.fromhex(token) + rank.to_bytes(4, "big"))
    return _kept_alive(connection)


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if (option := getattr(socket, name, None)) is not None:  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection
