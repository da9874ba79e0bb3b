"""How nodes find each other. Here all of them are on one machine, whose addresses differ; on several in tests/slurm."""

from __future__ import annotations

import json
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import meeting, node
from launch.meeting import Meeting, NotMet


def come(folder: Path, count: int) -> list[socket.socket]:
    """`count` nodes attend, each in a thread of its own; their connections."""
    found: list[socket.socket] = []
    threads = [threading.Thread(target=lambda: found.append(meeting.attend(folder))) for _ in range(count)]
    for thread in threads:
        thread.start()
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_nodes_meet_hear_the_head_and_their_death_is_noticed(tmp_path: Path):
    with Meeting(3, None, None) as head:
        head.invite(tmp_path)
        connections = come(tmp_path, 3)
        assert head.gather(120) == head.addresses[0]
        wait_for(lambda: len(connections) == 3)  # the last one may still be reading its answer
        head.send({"head": "10.0.0.1:6379"})
        assert [meeting.message(each, 120) for each in connections] == [{"head": "10.0.0.1:6379"}] * 3
        assert head.lost() is None
        assert all(meeting.is_open(each) for each in connections)
        connections[1].close()
        time.sleep(0.1)
        assert head.lost() == socket.gethostname()
        assert head.lost() == socket.gethostname()  # and stays lost
    assert not meeting.is_open(connections[0])  # the head is gone
    assert meeting.message(connections[2], 120) is None


def test_a_node_waits_for_the_head_and_says_whether_it_was_late_or_gone():
    here, head = socket.socketpair()
    with pytest.raises(SystemExit, match="the head has not started Ray within 0 s"):
        node.hear(here, 0.05)
    head.close()
    with pytest.raises(SystemExit, match="the head is gone before Ray was up"):
        node.hear(here, 5)
    here.close()


def test_the_invitation_is_private(tmp_path: Path):
    with Meeting(1, None, None) as head:
        head.invite(tmp_path)
    assert stat.S_IMODE((tmp_path / meeting.INVITATION).stat().st_mode) == 0o600


def test_an_address_where_somebody_else_answers_is_not_taken(tmp_path: Path):
    """As 172.17.0.1 is on every machine with Docker: each node reaches itself there."""
    stranger = socket.create_server(("127.0.0.2", 0))
    port = stranger.getsockname()[1]
    threading.Thread(target=lambda: stranger.accept()[0].close(), daemon=True).start()
    with Meeting(1, None, None) as head:
        head.listener.close()
        head.listener = socket.create_server(("127.0.0.1", port))
        head.addresses = ["127.0.0.2", "127.0.0.1"]
        head.invite(tmp_path)
        come(tmp_path, 1)
        assert head.gather(120) == "127.0.0.1"
    stranger.close()


def test_who_does_not_know_the_nonce_is_not_let_in(tmp_path: Path):
    with Meeting(1, None, None) as head:
        head.invite(tmp_path)
        address = ("127.0.0.1", head.listener.getsockname()[1])
        for line in (b'{"nonce": "guessed", "node": "x", "reached": []}\n', b"GET / HTTP/1.1\n", b"[]\n", b""):
            with socket.create_connection(address) as connection:
                connection.sendall(line)
        with pytest.raises(NotMet, match=r"1 of 1 other nodes did not reach this one within 1 s \(came: none\)"):
            head.gather(1)


def test_nodes_that_do_not_come_are_told_with_what_to_do(tmp_path: Path):
    with Meeting(2, None, None) as head:
        head.invite(tmp_path)
        come(tmp_path, 1)
        with pytest.raises(NotMet, match="(?s)1 of 2 other nodes did not reach.*came: .*`interface` and `ports`"):
            head.gather(1.5)


def test_a_head_that_is_not_there_is_told_by_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(meeting, "TRY_SECONDS", 0.3)
    with Meeting(1, None, None) as head:
        head.invite(tmp_path)
    with pytest.raises(NotMet, match="reaches the head at none of"):
        meeting.attend(tmp_path)


def test_an_interface_can_be_named_and_one_without_address_is_refused():
    assert meeting.addresses("lo") == ["127.0.0.1"]
    with pytest.raises(NotMet, match="no IPv4 address at 'nope0'. Interfaces: "):
        meeting.addresses("nope0")


def test_the_head_listens_within_the_profiles_ports():
    with Meeting(1, None, (28000, 28100)) as first, Meeting(1, None, (28000, 28100)) as second:
        ports = {each.listener.getsockname()[1] for each in (first, second)}
    assert len(ports) == 2 and all(28000 <= port <= 28100 for port in ports)


def test_a_killed_node_is_noticed_at_once(tmp_path: Path):
    code = "import sys, time; from pathlib import Path; from launch import meeting\n"
    code += "kept = meeting.attend(Path(sys.argv[1])); time.sleep(100)"
    with Meeting(1, None, None) as head:
        head.invite(tmp_path)
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
        head.gather(120)
        assert head.lost() is None
        process.kill()
        process.wait()
        assert head.lost()


def test_what_is_written_for_this_user_only_is_whole(tmp_path: Path):
    meeting.private(tmp_path / "x", json.dumps({"a": 1}))
    meeting.private(tmp_path / "x", json.dumps({"a": 2}))
    assert json.loads((tmp_path / "x").read_text()) == {"a": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
