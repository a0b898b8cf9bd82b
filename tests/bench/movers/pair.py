# SPDX-License-Identifier: Apache-2.0
"""What every way of moving a guest is measured with: the toucher (tests/guest/toucher.c) in a guest of
1 GiB that writes 123 MiB/s in 512 MiB, a process for it at either end, and what it says."""
import os

from lab import Failure, machine
from lab.guest import fields

MEMORY, TOUCHED, RATE = "1G", "512M", "123M"
FIGURES = ("fault_p50_us", "fault_p99_us", "fault_max_us", "random_p50_us", "random_p99_us", "stall_us")


class Pair:
    """`source` and `destination` are guests of the lab; `here` is where the guest runs now."""

    def __init__(self, lab, pinned):
        self.lab = lab
        self.pinned = pinned
        self.source = self.destination = self.here = None

    def boot(self, **options):
        """The source, with its guest, at its steady rate."""
        self.source = self.here = self.start("source", **options)
        self.source.wait_ready(600)
        self.pin(self.source, 0)
        self.own_bytes = machine.pss_bytes([self.source.pid])

    def wait_at_destination(self, **options):
        self.destination = self.start("destination", **options)
        return self.destination

    def start(self, name, **options):
        return self.lab.start_guest(name, memory=MEMORY, seed=7, touch=TOUCHED, rate=RATE, **options)

    def pin(self, guest, cpu):
        """The source to one CPU, the destination to another, with all of their threads."""
        for tid in machine.threads(guest.pid) if self.pinned else []:
            os.sched_setaffinity(tid, {cpu % os.cpu_count()})

    # ---- what the guest says ----

    def reset(self):
        self.here.command("reset", "reset")

    def figures(self):
        """Of all accesses since reset(): {name: microseconds}, and how many faults there were."""
        said = self.here.command("figures", "figures", 300)
        if said["errors"] != "0":
            raise Failure(f"the guest found wrong bytes: {said}")
        return {**{name: float(said[name]) for name in FIGURES},
                "faults": int(said["faults"]), "steps": int(said["steps"])}

    def verify(self):
        self.here.report(600)

    def resident_ratio(self):
        """Memory of both processes now, against the guest's own before it moved."""
        pids = [guest.pid for guest in (self.source, self.destination) if guest.is_alive()]
        return machine.pss_bytes(pids) / self.own_bytes


def told(guest, name):
    """The last line of this kind that the guest has said, as fields."""
    lines = [line for line in guest.console.lines() if f" {name} " in line]
    return fields(lines[-1]) if lines else {}
