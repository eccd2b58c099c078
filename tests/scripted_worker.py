"""What stands for a model's process in tests of `pat.benchmark.worker`: it does what the requests say.

A module of its own, because a process that is spawned imports what it runs.
"""

import os
import signal
import sys
from multiprocessing.connection import Connection

from pat.errors import PatError


def serve(connection: Connection) -> None:
    while True:
        try:
            action, arguments = connection.recv()
        except EOFError:
            return
        match arguments.get("does"):
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "leave":
                sys.exit(3)
            case "refuse":
                connection.send(PatError("Because."))
            case _:
                connection.send((action, arguments, os.getpid()))
