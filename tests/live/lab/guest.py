# SPDX-License-Identifier: Apache-2.0
"""One QEMU guest: its process, its console and what its workload says."""
import itertools
import os
import signal
import socket
import threading

from . import machine
from .errors import Failure, wait_for

_tags = itertools.count(1)
SAYS = "memd-guest: "


class Console:
    """The guest's serial port. What the guest says is read from the log that QEMU keeps of it,
    so nothing is lost before we connect; the socket is for what we say."""

    def __init__(self, directory, name, alive):
        self._path = os.path.join(directory, f"{name}.console")
        self._log = os.path.join(directory, f"{name}.log")
        self._alive = alive
        self._socket = None
        self._lines = []
        self._read_to = 0

    def lines(self):
        """All complete lines so far. (Not a snapshot: it grows.)"""
        try:
            with open(self._log, "rb") as file:
                file.seek(self._read_to)
                data = file.read()
        except FileNotFoundError:
            return self._lines
        complete = data.rfind(b"\n") + 1
        self._read_to += complete
        self._lines += [line.strip() for line in
                        data[:complete].decode(errors="replace").splitlines()]
        return self._lines

    def send(self, text):
        if not self._socket:
            self._connect()
        self._socket.sendall(text.encode())

    def _connect(self):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(self._path)
        # Nobody must let QEMU's side fill up: a full console stops the guest.
        threading.Thread(target=self._drain, args=(self._socket,), daemon=True).start()

    @staticmethod
    def _drain(connection):
        try:
            while connection.recv(65536):
                pass
        except OSError:
            pass

    def close(self):
        if self._socket:
            self._socket.close()
            self._socket = None

    def wait(self, what, wanted, seconds, start=0):
        """The first line from number `start` on for which wanted(line) holds."""
        def look():
            nonlocal start
            alive = self._alive()
            lines = self.lines()
            for line in lines[start:]:
                if wanted(line):
                    return line
            start = len(lines)
            if not alive:
                raise Failure(f"the VMM ended while {what} was awaited")
            return None
        return wait_for(what, look, seconds, 0.05)


def fields(line):
    """'memd-guest: report tag=3 errors=0' -> {'tag': '3', 'errors': '0'}"""
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


class Guest:
    """Made by Lab.start_guest(). `pid` is the VMM's."""

    def __init__(self, name, process, directory, stderr_path):
        self.name = name
        self.process = process
        self.pid = process.pid
        self._stderr_path = stderr_path
        self.console = Console(directory, name, self.is_alive)

    def stderr(self):
        with open(self._stderr_path, errors="replace") as file:
            return file.read()

    def is_alive(self):
        return self.process.poll() is None

    def is_ready(self):
        """Whether the guest has filled its memory; raises when its VMM ended before."""
        ready = any(line.startswith(SAYS + "ready") for line in self.console.lines())
        if not ready and not self.is_alive():
            raise Failure(f"guest {self.name}: its VMM ended with {self.process.returncode}: "
                          f"{self.stderr()[-600:]!r}, and the guest: {self.console.lines()[:3]}")
        return ready

    def wait_ready(self, seconds=180):
        wait_for(f"guest {self.name} to fill its memory", self.is_ready, seconds)

    def command(self, name, answer, seconds=180):
        """Gives the workload a command; returns the fields of its answer."""
        return self.await_answer(self.ask(name), answer, seconds)

    def ask(self, name):
        """The first half of command(), so that several guests can be at work at once."""
        tag = f"t{next(_tags)}"
        self.console.send(f"{name} {tag}\n")
        return tag

    def await_answer(self, tag, answer, seconds=180):
        line = self.console.wait(
            f"'{answer}' of guest {self.name}",
            lambda text: text.startswith(f"{SAYS}{answer} tag={tag} "), seconds)
        return fields(line)

    def report(self, seconds=180):
        """All memory verified afresh by the guest; raises when a byte is or ever was wrong."""
        return self.judge(self.command("report", "report", seconds))

    def judge(self, answer):
        corrupt = self.corruption()
        if answer["errors"] != "0" or corrupt:
            raise Failure(f"guest {self.name} found wrong bytes: {corrupt or answer}")
        if int(answer["pages"]) == 0:
            raise Failure(f"guest {self.name} verified nothing")
        return answer

    def corruption(self):
        return next((line for line in self.console.lines() if "CORRUPT" in line), None)

    def rounds(self):
        """How many rounds of verification the guest has told of."""
        told = [fields(line) for line in self.console.lines() if line.startswith(SAYS + "verified")]
        return int(told[-1]["rounds"]) if told else 0

    def wait_rounds(self, more, seconds=180):
        goal = self.rounds() + more
        wait_for(f"guest {self.name} to do {more} more rounds",
                 lambda: self.rounds() >= goal or not self.is_alive(), seconds)
        if not self.is_alive():
            raise Failure(f"guest {self.name} ended")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def pss_bytes(self):
        return machine.pss_bytes([self.pid])


def memory_options(regions):
    return " ".join(f"memd.{name}={value}" for name, value in regions.items())


def qemu_command(kernel, initramfs, accel, name, directory, memory, append, devices):
    """A stock QEMU with nothing but RAM and a serial port, and what `devices` adds."""
    how = {"kvm": ["-accel", "kvm", "-cpu", "host"],
           "tcg": ["-accel", "tcg,thread=single,tb-size=32"]}[accel]
    console = os.path.join(directory, f"{name}.console")
    log = os.path.join(directory, f"{name}.log")
    # no_timer_check: an interpreted guest on a busy host fails that test, and panics.
    append = f"console=ttyS0 quiet panic=-1 mitigations=off no_timer_check {append}"
    return [machine.QEMU, "-name", name, "-nodefaults", "-display", "none", "-no-reboot",
            "-m", memory, *how,
            "-kernel", kernel, "-initrd", initramfs,
            "-append", append,
            "-chardev", f"socket,id=console,path={console},server=on,wait=off,logfile={log}",
            "-serial", "chardev:console", *devices]
