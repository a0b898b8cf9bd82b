# SPDX-License-Identifier: Apache-2.0
"""memd: a stock QEMU at either end, a memd each, over TCP in the clear."""
import os
import time

from lab import Failure, Lab, api, wait_for
from lab.network import free_port

from .pair import MEMORY, Pair

NAME = "source"
AT_REST = {"sharing": {"revisit_s": 10, "cpu_percent": 50}}  # memd's own defaults, not those of the tests


class MemdPair(Pair):
    name = "memd"
    options = {"postcopy_only": True}
    without = None  # one of MEMD_MOVER_WITHOUT (memd-mover(8))

    def open(self):
        if self.without:
            os.environ["MEMD_MOVER_WITHOUT"] = self.without
        try:
            self._open()
        finally:
            os.environ.pop("MEMD_MOVER_WITHOUT", None)

    def _open(self):
        self._port = free_port()
        self._there = Lab(network=None)
        pin = f"taskset -c {1 % os.cpu_count()}" if self.pinned else ""
        self.lab.start_memd({"migration": {"plain": "yes"}, **AT_REST})
        self._there.start_memd({"migration": {"plain": "yes", "listen": f"127.0.0.1:{self._port}"},
                                **AT_REST, **self._there.awaits_qemu(NAME, MEMORY, prefix=pin)})
        self.boot()
        self.lab.wait_connected(NAME)
        self._bandwidth = None

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
        self.here = self.destination = self._there.arrived_qemu(NAME)

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
            now = self.status()  # the data connections don't go through the relay: it is back at once
            if not now["linked"] or now["reconnects"]:
                return time.monotonic() - begun
            time.sleep(0.02)
        return None

    def close(self):
        pass  # the source has ended by itself

    def end(self):
        self._there.close()


def without(what):
    """memd as it would be without one of the things that make it fast."""
    return type(f"MemdWithout{what.title()}", (MemdPair,), {"name": f"memd without {what}", "without": what})
