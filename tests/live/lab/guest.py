# SPDX-License-Identifier: Apache-2.0
"""One guest, of QEMU or memvm: its process, its console and what its workload says."""
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


class PipeConsole(Console):
    """memvm's serial port: what the guest says is in the log, what we say goes to its standard input."""

    def __init__(self, directory, name, alive, pipe):
        super().__init__(directory, name, alive)
        self._pipe = pipe

    def send(self, text):
        try:
            self._pipe.write(text.encode())
            self._pipe.flush()
        except BrokenPipeError:
            raise Failure("the VMM has ended, and takes no command") from None

    def close(self):
        try:
            self._pipe.close()
        except BrokenPipeError:
            pass


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
            raise Failure(f"guest {self.name}: its VMM ended with {self.process.returncode}: "
                          f"{self.stderr()[-600:]!r}, and the guest: {self.console.lines()[-3:]}")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def pss_bytes(self):
        return machine.pss_bytes([self.pid])


class MemvmGuest(Guest):
    """The bare guest in memvm, made by Lab.start_memvm(). It says and understands the same."""

    def __init__(self, name, process, directory, stderr_path):
        super().__init__(name, process, directory, stderr_path)
        self.console = PipeConsole(directory, name, self.is_alive, process.stdin)

    def figure(self, name):
        """The latest that its `verified` line says of it ('hot-writes', 'flips', 'given-up', ...)."""
        told = [fields(line) for line in self.console.lines() if line.startswith(SAYS + "verified")]
        return int(told[-1][name]) if told else 0

    def vcpu_threads(self):
        """The ids of its vCPUs' threads."""
        return [tid for tid in machine.threads(self.pid) if machine.thread_name(self.pid, tid).startswith("vcpu")]

    def stop(self, seconds=60):
        """The guest ends its machine; raises when that fails, or a byte was wrong."""
        self.console.send("stop s\n")
        status = self.process.wait(seconds)
        if status != 0 or self.corruption():
            raise Failure(f"guest {self.name}: memvm ended with {status}: {self.corruption()} {self.stderr()[-400:]!r}")

    def save(self, seconds=60):
        """memvm (started with save=) writes the machine into its file and ends."""
        self.process.terminate()
        status = self.process.wait(seconds)
        if status != 0:
            raise Failure(f"guest {self.name}: saving it failed: {self.stderr()[-400:]!r}")


class ArrivedProcess:
    """A VMM that memd has started: no child of ours, so that it is known by its pid."""

    def __init__(self, pid, stdin):
        self.pid = pid
        self.stdin = stdin
        self.returncode = None

    def poll(self):
        return None if machine.is_alive(self.pid) else -1

    def wait(self, seconds=60):
        wait_for(f"process {self.pid} to end", lambda: not machine.is_alive(self.pid), seconds)
        return 0  # whoever its parent is knows better

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


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


def memvm_command(name, directory, memory, cpus, regions, save=None, load=None, incoming=False, restore=None,
                  options=()):
    """memvm with its serial port in a log; a new machine with the bare guest, a saved one, or one that
    waits for a guest to come."""
    log = os.path.join(directory, f"{name}.log")
    command = [machine.program("memvm"), "--serial", log, *(["--save", save] if save else []), *options]
    if load or restore:
        return [*command, *(["--load", load] if load else ["--restore", restore])]
    command += ["--memory", memory, "--cpus", str(cpus)]
    if incoming:
        return [*command, "--incoming"]
    return [*command, machine.program("bare-guest"),
            *(f"{key}={value}" for key, value in regions.items())]
