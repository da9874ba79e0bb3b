"""What runs on every node of a job but the head: it joins the head's Ray and ends when the head does.

`python -m launch.node JOB ATTEMPT`, started once for all nodes by job.py. The guardian holds Ray, so nothing is left
here when this process is killed, either.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from launch import guardian, meeting
from launch.job_folder import Job, clean_environment, place_of

POLL_SECONDS = 0.2
HEAD_SECONDS = 10
"""Of the head's own, besides gathering the nodes and starting Ray."""


def main() -> None:
    """Entry point."""
    folder, attempt = Path(sys.argv[1]), Path(sys.argv[2])
    job = Job.read(folder)
    clean_environment(attempt)
    connection = meeting.attend(attempt)
    told = hear(connection, job.profile.form_seconds + guardian.START_SECONDS + HEAD_SECONDS)
    os.environ |= told["environment"]
    ip = meeting.own_address(told["head"].rpartition(":")[0])
    place = replace(place_of(job.profile, told["gpus"], attempt), ip=ip, head=told["head"])
    guardian.hold(guardian.Guardian(place), lambda held: stay(held, connection))


def hear(connection: socket.socket, seconds: float) -> dict[str, Any]:
    """The head's message, once Ray is up there. Raises SystemExit in words."""
    try:
        told = meeting.message(connection, seconds)
    except TimeoutError:
        raise SystemExit(f"{socket.gethostname()}: the head has not started Ray within {seconds:.0f} s") from None
    if told is None:
        raise SystemExit(f"{socket.gethostname()}: the head is gone before Ray was up")
    return told


def stay(held: guardian.Guardian, connection: socket.socket) -> None:
    """Join Ray; return when the head, Ray or the keeper is gone, or on SIGTERM. The guardian then ends everything."""
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    signal.signal(signal.SIGTERM, stop)
    try:
        held.start_ray()
    except RuntimeError as error:
        print(f"{socket.gethostname()}: {error}", flush=True)
        return
    print(f"{socket.gethostname()}: joined Ray at {held.place.head}", flush=True)
    while not asked and os.getppid() == held.keeper and meeting.is_open(connection):
        if lost := held.lost_ray():
            print(f"{socket.gethostname()}: {lost}", flush=True)
            return
        held.note_segments()
        time.sleep(POLL_SECONDS)
    print(f"{socket.gethostname()}: the head or the keeper is gone, or a signal came; ending", flush=True)


if __name__ == "__main__":
    main()
