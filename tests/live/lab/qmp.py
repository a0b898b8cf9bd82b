# SPDX-License-Identifier: Apache-2.0
"""QEMU's monitor, as a test needs it: commands and their answers."""
import json
import socket

from .errors import Failure, wait_for


class Qmp:
    """A connection to a QMP socket that the test gave QEMU with qmp_devices(). `events` has those that
    came while it was asked something, the oldest first."""

    def __init__(self, path):
        self.events = []
        self._socket = socket.socket(socket.AF_UNIX)
        wait_for(f"QMP socket {path}", lambda: self._try(path), 30)
        self._socket.settimeout(60)
        self._file = self._socket.makefile("r")
        json.loads(self._file.readline())  # the greeting
        self.run("qmp_capabilities")

    def _try(self, path):
        try:
            self._socket.connect(path)
            return True
        except (FileNotFoundError, ConnectionRefusedError):
            return False

    def run(self, command, **arguments):
        """The `return` of a command."""
        words = {"execute": command, **({"arguments": arguments} if arguments else {})}
        self._socket.sendall(json.dumps(words).encode() + b"\n")
        while True:
            line = self._file.readline()
            if not line:
                raise Failure(f"QEMU closed its monitor during {command}")
            answer = json.loads(line)
            if "error" in answer:
                raise Failure(f"QMP {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
            self.events.append(answer)


def qmp_devices(path):
    return ["-chardev", f"socket,id=testmon,path={path},server=on,wait=off",
            "-mon", "chardev=testmon,mode=control"]
