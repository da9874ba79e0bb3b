"""How the nodes of a job find each other, whatever their network interfaces are, and notice when one is gone.

The head listens on all its addresses and writes them into an invitation file. Every other node tries each address and
says which it reached; the first that all of them reached is where Ray listens. The connections stay open: a node that
dies, or whose processes are killed, closes its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import socket
import time
from pathlib import Path
from typing import Any

import psutil

from launch.guardian import is_free

INVITATION = "invitation.json"
TRY_SECONDS = 3.0
ANSWER = b"yes\n"
_VIRTUAL = ("docker", "virbr", "veth", "br-", "cni", "flannel", "lxc", "tun", "tap")
"""Interfaces that lead nowhere outside the machine, as a rule: tried last."""


class NotMet(RuntimeError):
    """The nodes did not find each other."""


class Meeting:
    """The head's side."""

    def __init__(self, others: int, interface: str | None, ports: tuple[int, int] | None) -> None:
        self.others = others
        self.addresses = addresses(interface)
        self.nonce = secrets.token_hex(16)
        self.nodes: dict[socket.socket, str] = {}
        self.gone: str | None = None
        port = next((port for port in range(ports[0], ports[1] + 1) if is_free(port)), 0) if ports else 0
        self.listener = socket.create_server(("0.0.0.0", port), backlog=4096)

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, *error: object) -> None:
        for connection in (*self.nodes, self.listener):
            connection.close()

    def invite(self, folder: Path) -> None:
        """Write the invitation for the other nodes, readable by this user only."""
        port = self.listener.getsockname()[1]
        private(folder / INVITATION, json.dumps({"addresses": self.addresses, "port": port, "nonce": self.nonce}))

    def gather(self, seconds: float) -> str:
        """Wait for all other nodes; the address at which they all reach this one.

        Raises:
            NotMet: some did not come in time, or they have no address in common.
        """
        reached = [list(self.addresses)]
        deadline = time.monotonic() + seconds
        while len(self.nodes) < self.others:
            self.listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = self.listener.accept()
            except TimeoutError:
                raise NotMet(self._missing(seconds)) from None
            if hello := self._greet(connection):
                reached.append(hello["reached"])
        common = [address for address in self.addresses if all(address in each for each in reached)]
        if not common:
            seen = dict(zip(self.nodes.values(), reached[1:], strict=True))
            raise NotMet(
                f"no address of the head is reached by all nodes: {seen}. The profile's `interface` names one."
            )
        return common[0]

    def send(self, message: dict[str, Any]) -> None:
        """One message to every node."""
        for connection in self.nodes:
            with contextlib.suppress(OSError):  # `lost` tells
                _say(connection, message)

    def lost(self) -> str | None:
        """The name of a node that is gone, or None."""
        readable = select.select(list(self.nodes), [], [], 0)[0] if self.nodes and not self.gone else []
        for connection in readable:
            if not _receive(connection):
                self.gone = self.nodes[connection]
        return self.gone

    def _greet(self, connection: socket.socket) -> dict[str, Any] | None:
        """A node's first message, answered; None if it only tries an address, or does not know the nonce."""
        connection.settimeout(TRY_SECONDS)
        try:
            hello = json.loads(_line(connection))
            if hello["nonce"] == self.nonce:
                connection.sendall(ANSWER)
        except (OSError, ValueError, KeyError, TypeError):
            hello = {}
        if hello.get("nonce") != self.nonce or "reached" not in hello:
            connection.close()
            return None
        _notice_death(connection)
        self.nodes[connection] = hello["node"]
        return hello

    def _missing(self, seconds: float) -> str:
        came = ", ".join(self._names()) or "none"
        return (
            f"{self.others - len(self.nodes)} of {self.others} other nodes did not reach this one within {seconds:.0f} "
            f"s (came: {came}). It listens at {', '.join(self.addresses)}, port {self.listener.getsockname()[1]}: are "
            "the nodes' ports open to each other? The profile's `interface` and `ports` say where."
        )

    def _names(self) -> list[str]:
        return sorted(self.nodes.values())


def attend(folder: Path) -> socket.socket:
    """Another node's side: reach the head and say so; the connection stays open.

    Raises:
        NotMet: none of the head's addresses answers.
    """
    invitation = json.loads((folder / INVITATION).read_text())
    port, nonce = invitation["port"], invitation["nonce"]
    reached = [address for address in invitation["addresses"] if _answers(address, port, nonce)]
    if not reached:
        raise NotMet(f"{socket.gethostname()} reaches the head at none of {invitation['addresses']}, port {port}.")
    connection = socket.create_connection((reached[0], port), timeout=10 * TRY_SECONDS)
    _say(connection, {"node": socket.gethostname(), "nonce": nonce, "reached": reached})
    _line(connection)
    _notice_death(connection)
    return connection


def _answers(address: str, port: int, nonce: str) -> bool:
    """Whether the head is there, and not somebody who has the same address or port on another machine."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=TRY_SECONDS) as connection:
        _say(connection, {"nonce": nonce})
        return _line(connection) == ANSWER
    return False


def _say(connection: socket.socket, values: dict[str, Any]) -> None:
    connection.sendall(json.dumps(values).encode() + b"\n")


def message(connection: socket.socket, seconds: float) -> dict[str, Any] | None:
    """The head's next message; None if it is gone. Raises TimeoutError if nothing comes in time."""
    connection.settimeout(seconds)
    try:
        line = _line(connection)
    except TimeoutError:
        raise
    except OSError:
        return None
    return json.loads(line) if line else None


def is_open(connection: socket.socket) -> bool:
    """Whether the other side is still there; does not wait."""
    return not select.select([connection], [], [], 0)[0] or bool(_receive(connection))


def own_address(towards: str) -> str:
    """This node's address on the way to another one; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))
        return str(probe.getsockname()[0])


def addresses(interface: str | None) -> list[str]:
    """This node's IPv4 addresses, the likely ones first: what its name stands for, real interfaces, virtual ones.

    Raises:
        NotMet: the named interface has none.
    """
    found = {
        name: [entry.address for entry in entries if entry.family == socket.AF_INET]
        for name, entries in psutil.net_if_addrs().items()
    }
    if interface is not None:
        if not found.get(interface):
            raise NotMet(f"{socket.gethostname()} has no IPv4 address at {interface!r}. Interfaces: {sorted(found)}.")
        return found[interface]
    named = _named()
    order = sorted(found, key=lambda name: (not set(found[name]) & named, name.startswith(_VIRTUAL), name))
    return [address for name in order for address in found[name] if not address.startswith("127.")] or ["127.0.0.1"]


def private(path: Path, text: str) -> None:
    """Write a file that nobody else may read, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _named() -> set[str]:
    with contextlib.suppress(OSError):
        return {str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    return set()


def _line(connection: socket.socket) -> bytes:
    """Up to the next newline; empty when the other side is gone."""
    read = b""
    while not read.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            return b""
        read += byte
    return read


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(4096)
    except OSError:
        return b""


def _notice_death(connection: socket.socket) -> None:
    """A machine that lost its power closes nothing: ask it every few seconds."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
