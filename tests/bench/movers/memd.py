# SPDX-License-Identifier: Apache-2.0
"""memd: a stock QEMU at either end, a memd each, over TCP in the clear."""
import os
import shlex
import socket
import time

from lab import Failure, Lab, api, machine, wait_for
from lab.guest import ArrivedProcess, Guest, qemu_command

from .pair import MEMORY, Pair

NAME = "source"
AT_REST = {"sharing": {"revisit_s": 10, "cpu_percent": 50}}  # memd's own defaults, not those of the tests


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class MemdPair(Pair):
    name = "memd"
    options = {"postcopy_only": True}

    def open(self):
        self._port = free_port()
        self._there = Lab(network=None)
        self.lab.start_memd({"migration": {"plain": "yes"}, **AT_REST})
        self._there.start_memd({"migration": {"plain": "yes", "listen": f"127.0.0.1:{self._port}"},
                                **AT_REST, **self._awaits()})
        self.boot()
        self.lab.wait_connected(NAME)
        self._bandwidth = None

    def _awaits(self):
        lab, files = self._there, machine.guest_files()
        qemu = qemu_command(files + "/vmlinuz", files + "/initramfs", lab.accelerator, NAME, lab.directory, MEMORY, "", [])
        command = [machine.program("memctl"), "--socket", lab.socket, "run", "--name", NAME, "--incoming", "--", *qemu]
        script = os.path.join(lab.directory, "incoming.sh")
        pin = f"taskset -c {1 % os.cpu_count()} " if self.pinned else ""
        with open(script, "w") as file:
            file.write(f"exec {pin}{shlex.join(command)} 2>> {lab.directory}/{NAME}.stderr\n")
        return {f"guest {NAME}": {"max": MEMORY, "incoming_user": 0, "incoming": f"/bin/sh {script}"}}

    def limit(self, bandwidth):
        """Bytes a second, for the migration that begins next; None: as fast as it goes."""
        self._bandwidth = bandwidth

    def begin(self, link=lambda port: port):
        wanted = {"to": f"127.0.0.1:{link(self._port)}", **self.options}
        if self._bandwidth:
            wanted["bandwidth_bytes"] = self._bandwidth
        status, answer = api.request(self.lab.socket, "POST", f"/v1/guests/{NAME}/migrate", wanted)
        if status // 100 != 2:
            raise Failure(f"memd does not move the guest: {answer}")
        wait_for("the guest to run at the destination", self._runs_there, 300, 0.01)
        pid = self._there.guest_status(NAME)["pid"]
        self.destination = Guest(NAME, ArrivedProcess(pid, None), self._there.directory,
                                 os.path.join(self._there.directory, f"{NAME}.stderr"))
        self.here = self.destination

    def status(self):
        return self.lab.get(f"/v1/guests/{NAME}/migrate")

    def _runs_there(self):
        now = self.status()
        if now["status"] not in ("running", "completed"):
            raise Failure(f"memd's migration: {now['status']}: {now['reason']}")
        return now["stage"] in ("postcopy", "done")

    def finish(self, seconds=600):
        wait_for("memd's migration to end", lambda: self.status()["status"] != "running", seconds, 0.02)
        report = self.status()
        if report["status"] != "completed":
            raise Failure(f"memd's migration: {report}")
        wait_for("the source's QEMU to end", lambda: not self.source.is_alive(), 60, 0.05)
        seconds = report["postcopy_s"] or report["total_s"]
        return {"total_s": report["total_s"], "postcopy_s": report["postcopy_s"],
                "downtime_ms": report["downtime_s"] * 1000, "bytes": report["bytes_sent"],
                "bulk_mib_s": report["bytes_sent"] / seconds / (1 << 20)}

    def wait_noticed(self, seconds):
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            if not self.status()["linked"]:
                return time.monotonic() - begun
            time.sleep(0.02)
        return None

    def close(self):
        pass  # the source has ended by itself

    def end(self):
        self._there.close()
