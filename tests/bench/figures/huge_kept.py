# SPDX-License-Identifier: Apache-2.0
"""huge_kept: what becomes of huge pages that are hot and have nothing to share.

Three pairs of guests run side by side (no CPU time is measured here, so they may): under memd and
under ksmd, both as shipped, and kept out of both (mem-merge=off). As much of their memory as possible
is rewritten all the time, each page every `round_s` seconds. Two dumps before the engines start find
the 2 MiB pieces of which nearly every page changes; of those that are one huge page then, how many
still are a minute later?"""
import time

from lab import Failure

from kit import ram
from kit.figure import Row, median, say, text
from kit.fleet import KERNEL_WORDS, Fleet, regions
from kit.ksmd import AS_SHIPPED

FIGURES = ("huge_kept",)

PAIR = 2
MEMORY = "192M"
HOT = {"hot": 90}
DUTY = 25          # six guests: one and a half cores
APART_S = 8        # some rounds of the guests' workload
CHANGED = 0.98     # of the pages of a hot piece
WINDOW_S = 60
AS_IT_COMES = {"revisit_s": 10, "cpu_percent": 50}  # memd.conf(5)


class Aside(Fleet):
    """Guests that no engine gets."""
    name = "none"

    def boot(self, count, memory, content):
        for number in range(1, count + 1):
            self.guests.append(self.lab.start_guest(
                f"none{number}", memory=memory, plain=True, seed=20 + number, append=KERNEL_WORDS,
                devices=["-machine", "mem-merge=off"], **content))

    def wait_filled(self):
        super().wait_filled()
        for guest in self.guests:
            guest.blocks = ram.largest_block(guest.pid)



def measure(machine, _options, _names, _run):
    say(f"3 x {PAIR} guests of {MEMORY} boot, nearly all of it hot")
    with machine.fleet("ksmd") as ksmd, machine.fleet("memd") as memd, machine.lab() as lab:
        fleets = [ksmd, memd, Aside(lab)]
        memd.tuning = AS_IT_COMES
        for fleet in fleets:
            fleet.boot(PAIR, MEMORY, regions(MEMORY, HOT, duty=DUTY))
        for fleet in fleets:
            fleet.wait_filled()
        hot = hot_huge(fleets)
        ksmd.ksmd.start(AS_SHIPPED)
        memd.start()
        rounds = {guest: guest.rounds() for guest in hot}
        time.sleep(WINDOW_S)
        rounds = {guest: guest.rounds() - before for guest, before in rounds.items()}
        found = {fleet.name: kept(fleet, hot, rounds) for fleet in fleets}
        memd.lab.report_all()
    say("huge pages kept: " + ", ".join(
        f"{name} {one['kept']} of {one['huge']}, rewritten every {one['round_s'] or WINDOW_S:.1f} s"
        for name, one in found.items()))
    return {"huge_kept": found}


def hot_huge(fleets):
    """{guest: the addresses of its hot huge pages}"""
    first = [ram.dump_all(fleet.guests, fleet.lab.directory, "first") for fleet in fleets]
    time.sleep(APART_S)
    second = [ram.dump_all(fleet.guests, fleet.lab.directory, "second") for fleet in fleets]
    hot = {guest: ram.hot_pieces(guest.blocks, *dumps, CHANGED) & ram.huge_pages(guest.pid, guest.blocks)
           for fleet, *pairs in zip(fleets, first, second)
           for guest, *dumps in zip(fleet.guests, *pairs)}
    ram.remove(*first, *second)
    return hot


def kept(fleet, hot, rounds):
    pieces = {guest: hot[guest] for guest in fleet.guests}
    huge = sum(map(len, pieces.values()))
    if not huge:
        raise Failure(f"no hot huge page in the guests of {fleet.name}: are transparent huge pages on?")
    left = sum(len(ram.huge_pages(guest.pid, guest.blocks) & addresses)
               for guest, addresses in pieces.items())
    done = sum(rounds[guest] for guest in fleet.guests)
    return {"huge": huge, "kept": left, "part": left / huge,
            "round_s": WINDOW_S * len(fleet.guests) / done if done else None}


def rows(_name, runs):
    parts = [median(runs, name, "part") for name in ("memd", "ksmd", "none")]
    memd, ksmd, none = (text(part and 100 * part, "{:.0f} %") for part in parts)
    return [Row(f"huge pages of hot, unshared memory kept after {WINDOW_S} s (no engine: {none})",
                memd, ksmd, memd, "90 %", "all")]
