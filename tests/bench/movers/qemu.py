# SPDX-License-Identifier: Apache-2.0
"""QEMU's own post-copy, with the preempt channel where it has one: two stock QEMUs over TCP."""
import os
import socket
import time

from lab import Failure, wait_for
from lab.qmp import Qmp, qmp_devices

from .pair import Pair

FULL_SPEED = 100 << 30
CAPABILITIES = ("events", "postcopy-ram", "postcopy-preempt")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class QemuPair(Pair):
    name = "QEMU"

    def open(self):
        self.boot(plain=True, devices=qmp_devices(self._path("source")))
        self.wait_at_destination(plain=True, devices=[*qmp_devices(self._path("destination")), "-incoming", "defer"])
        self._from, self._to = (Qmp(self._path(name)) for name in ("source", "destination"))
        self.pin(self.destination, 1)
        for monitor in (self._from, self._to):
            monitor.run("migrate-set-capabilities", capabilities=[
                {"capability": each, "state": True} for each in CAPABILITIES if self._has(monitor, each)])

    def _path(self, name):
        return os.path.join(self.lab.directory, f"{name}.bench")

    @staticmethod
    def _has(monitor, capability):
        return any(each["capability"] == capability for each in monitor.run("query-migrate-capabilities"))

    def limit(self, bandwidth):
        """Bytes a second; None: as fast as it goes."""
        for name in ("max-bandwidth", "max-postcopy-bandwidth"):
            self._from.run("migrate-set-parameters", **{name: bandwidth or FULL_SPEED})

    def begin(self, link=lambda port: port):
        """Post-copy from the first moment. link: gives the port to connect to for the one that is listened on."""
        port = free_port()
        self._to.run("migrate-incoming", uri=f"tcp:127.0.0.1:{port}")
        self._from.run("migrate", uri=f"tcp:127.0.0.1:{link(port)}")
        self._from.run("migrate-start-postcopy")
        wait_for("the guest to run at the destination", self._runs_there, 300, 0.005)
        self.here = self.destination

    def _runs_there(self):
        self._to.run("query-status")
        return self._when(self._to, "RESUME") is not None

    def status(self):
        return self._from.run("query-migrate").get("status")

    def finish(self, seconds=600):
        def ended():
            status = self.status()
            if status not in ("active", "setup", "device", "postcopy-active", "completed"):
                raise Failure(f"QEMU's migration: {status}")
            return status == "completed"
        wait_for("QEMU's migration to end", ended, seconds, 0.02)
        return self._times()

    def wait_noticed(self, seconds):
        """Seconds until either side has noticed that the link is dead; None: not in so many."""
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            there = self._to.run("query-migrate").get("status")
            if self.status() != "postcopy-active" or there not in ("postcopy-active", "active", None):
                return time.monotonic() - begun
            time.sleep(0.02)
        return None

    @staticmethod
    def _when(monitor, event, status=None):
        """Seconds (since the epoch) of the first such event."""
        for each in monitor.events:
            if each["event"] == event and (status is None or each["data"]["status"] == status):
                return each["timestamp"]["seconds"] + each["timestamp"]["microseconds"] / 1e6
        return None

    def _times(self):
        ram = self._from.run("query-migrate")["ram"]
        self._to.run("query-status")
        begun, switched, ended = (self._when(self._from, "MIGRATION", status)
                                  for status in ("setup", "postcopy-active", "completed"))
        stopped, resumed = self._when(self._from, "STOP"), self._when(self._to, "RESUME")
        return {"total_s": ended - begun, "postcopy_s": ended - switched, "downtime_ms": (resumed - stopped) * 1000,
                "bytes": ram["transferred"], "bulk_mib_s": ram["postcopy-bytes"] / (ended - switched) / (1 << 20)}

    def close(self):
        self.source.kill()  # memd ends it by itself; QEMU waits to be told

    def end(self):
        pass  # the lab ends everything
