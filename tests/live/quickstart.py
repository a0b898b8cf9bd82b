# SPDX-License-Identifier: Apache-2.0
"""The run that ./quickstart shows, after packages and build. A list of steps (`STEPS`): each gets
the Show, does one thing, and raises Failure if what it is about to say is not true."""
import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time

from lab import Failure, Lab, PAGE, machine
from lab.errors import wait_for
from lab.network import free_port

QUIET_S = 8           # sharing has settled when so long ...
QUIET_PART = 0.01     # ... no more than this part was gained
SETTLE_LIMIT_S = 150
BOOT_LIMIT_S = 300
MOVE_LIMIT_S = 120
TRUE_WITHIN = 0.15    # how far the kernel's figures may be from memd's: the guests go on meanwhile
MEMVM_GUESTS = 20     # small ones, beside the others where KVM works
MEMVM_MEMORY = "16M"
MEMVM_REGIONS = {"common": "7M", "zero": "2M", "twin": "1M", "unique": "1M", "churn": "512K", "hot": "256K"}
MOVES = "guest1"
KERNEL_AND_QEMU = 76 << 20  # of a guest's RAM, what its kernel and initramfs need for themselves


def mib(size):
    return f"{size / (1 << 20):.0f}"


class Show:
    """What the steps share: options, the lab, and the figures collected on the way."""

    def __init__(self, options):
        self.options = options
        self.started = float(os.environ.get("MEMD_QUICKSTART_STARTED", time.time()))
        self.tty = sys.stdout.isatty()
        self.lab = None
        self.there = None         # where a guest moves to: another memd
        self.engine = None
        self.memvms = []          # names of the guests under memvm
        self.before_bytes = None  # PSS of everything before sharing
        self.after_bytes = None
        self.status = None        # memd's figures, taken with after_bytes
        self.guests = {}          # name -> GET /v1/guests/NAME, likewise
        self._open_line = False
        self._last_text = ""

    def say(self, text):
        self.end_progress()
        print(f"[{time.time() - self.started:4.0f} s] {text}", flush=True)

    def progress(self, text):
        """One line that changes in place; on what is no terminal, a line when there is news."""
        line = f"[{time.time() - self.started:4.0f} s] {text}"
        if self.tty:
            print(f"\r\033[K{line}", end="", flush=True)
            self._open_line = True
        elif text != self._last_text:
            print(line, flush=True)
        self._last_text = text

    def end_progress(self):
        if self._open_line:
            print(flush=True)
            self._open_line = False

    def names(self):
        return list(self.lab.guests)

    def promised_bytes(self, name):
        return machine.as_bytes(MEMVM_MEMORY if name in self.memvms else self.options.memory)


# ---- what the guests hold ----

def regions_for(memory_bytes):
    """The guests' memory as a fleet has it: much in common, some of its own, a little in motion."""
    room = memory_bytes - KERNEL_AND_QEMU
    if room < (16 << 20):
        raise SystemExit("quickstart: --memory must be 96M or more: the guests' kernel needs its part")
    parts = {"common": 50, "zero": 14, "unique": 10, "twin": 8, "churn": 4, "hot": 2}
    return {name: room * percent // 100 // PAGE * PAGE for name, percent in parts.items()}


# ---- the steps ----

def say_where(show):
    words = {"kvm": "KVM (a real kernel boots under it)",
             "tcg": "QEMU's TCG (no real kernel boots under /dev/kvm here)"}
    show.say(f"guests run under {words[show.lab.accelerator]}")


def choose_engine(show):
    """The agent needs UFFDIO_MOVE (Linux 6.8) and more; without, memd steers the kernel's KSM."""
    obstacle = machine.agent_obstacle()
    show.engine = "kernel" if obstacle else "agent"
    if obstacle:
        show.say(f"no agent on this kernel ({os.uname().release}): {obstacle}")
        show.say("sharing goes through kernel KSM, which memd steers")


def configuration(show, revisit_s):
    sections = {"sharing": {"engine": show.engine, "revisit_s": revisit_s}}
    if show.engine == "agent":
        sections["migration"] = {"plain": "yes"}
    if show.options.budget:
        sections["host"] = {"budget": show.options.budget}
    return sections, {"quickstart": [0]}


def start_memd(show):
    """Scans are ten minutes apart at first, so that there is a state before sharing to measure."""
    show.lab.start_memd(*configuration(show, 600))
    show.say(f"memd runs, socket {show.lab.socket}")


def start_memvms(show):
    """Guests under the real /dev/kvm, in a VMM that links memd. Small enough for a KVM that has no
    help from the processor."""
    if show.engine != "agent":
        show.say("no guests under memvm: it is there to show the agent")
        return
    if machine.memvm_obstacle():
        show.say(f"no guests under memvm: {machine.memvm_obstacle()}")
        return
    for number in range(1, MEMVM_GUESTS + 1):
        show.memvms.append(f"memvm{number}")
        show.lab.start_memvm(f"memvm{number}", memory=MEMVM_MEMORY, domain="quickstart", duty=1, every=10,
                             **MEMVM_REGIONS)
    wait_for("the guests under memvm", lambda: all(show.lab.guests[name].is_ready() for name in show.memvms),
             BOOT_LIMIT_S, 0.2)
    show.lab.wait_connected(*show.memvms)
    show.say(f"{MEMVM_GUESTS} guests with {MEMVM_MEMORY} each run under memvm (KVM), a VMM that links memd")


def boot_guests(show):
    count, memory = show.options.guests, show.options.memory
    regions = regions_for(machine.as_bytes(memory))
    show.say(f"booting {count} guests with {memory} each")
    for number in range(1, count + 1):
        show.lab.start_guest(f"guest{number}", memory=memory, domain="quickstart", duty=5, **regions)
    wait_for("the guests to boot", lambda: all_ready(show), BOOT_LIMIT_S, 1)
    if show.engine == "agent":
        show.lab.wait_connected(*show.names())
    show.end_progress()


def all_ready(show):
    guests = show.lab.guests.values()
    ready = sum(guest.is_ready() for guest in guests)
    show.progress(f"{ready} of {len(guests)} guests have booted and filled their memory")
    return ready == len(guests)


def measured(show):
    """PSS of all VMMs and memd, from the kernel, not from memd."""
    return machine.pss_bytes(show.lab.pids())


def measure_before(show):
    show.before_bytes = measured(show) + show.lab.sharing()["saved_bytes"]
    promised = sum(show.promised_bytes(name) for name in show.names())
    show.say(f"before sharing the VMMs hold {mib(show.before_bytes)} MiB: their guests' memory "
             f"({mib(promised)} MiB promised) and their own")


def start_sharing(show):
    show.lab.reload_memd(*configuration(show, 2))
    show.say("sharing begins")


def wait_settled(show):
    """Until the gain of the last QUIET_S seconds was small. The guests write all the time, so the
    figure never stands still."""
    seen = []
    first = time.monotonic()

    def settled():
        now, status = time.monotonic(), show.lab.status()
        sharing = status["sharing"]
        seen.append((now, sharing["saved_bytes"]))
        show.progress(f"sharing: {mib(sharing['saved_bytes'])} MiB saved, "
                      f"{sharing['pages_shared']} pages in the store, "
                      f"{sharing['cpu_seconds']:.1f} s of CPU")
        past = max((saved for when, saved in seen if now - when >= QUIET_S), default=None)
        if now - first > SETTLE_LIMIT_S:
            raise Failure(f"sharing did not settle in {SETTLE_LIMIT_S} s")
        # Guests under memvm share long before those that had to boot a kernel.
        all_share = show.engine == "kernel" or all(guest["places"]["shared"] for guest in status["guests"])
        return past and all_share and sharing["saved_bytes"] <= past * (1 + QUIET_PART)

    wait_for("sharing to settle", settled, SETTLE_LIMIT_S + 10, 1 if show.tty else 3)
    show.end_progress()


def let_guests_verify(show):
    show.say("every guest verifies all of its memory")
    reports = show.lab.report_all()
    if len(reports) != len(show.names()):
        raise Failure(f"only {len(reports)} of {len(show.names())} guests live")
    pages = sum(int(report["pages"]) for report in reports.values())
    show.say(f"{len(reports)} guests, {pages} pages, 0 errors")


def collect(show):
    """memd's figures and the kernel's, as close together as can be."""
    show.after_bytes = measured(show)
    show.status = show.lab.status()
    show.guests = {name: show.lab.guest_status(name) for name in show.names()}


def rows(show):
    """For the table: name, and bytes promised, resident, shared, zero, saved; CPU seconds."""
    guests = {guest["name"]: guest for guest in show.status["guests"]}
    sharing = show.status["sharing"]
    all_shared = sum(guest["places"]["shared"] for guest in guests.values()) or 1
    for name in show.names():
        guest, places = guests[name], guests[name]["places"]
        # A guest's part of what sharing saves is its part of the shared pages.
        saved = sharing["pages_sharing"] * places["shared"] / all_shared + places["zero"]
        yield (name, guest["max_bytes"], guest["resident_bytes"], places["shared"] * PAGE,
               places["zero"] * PAGE, saved * PAGE, show.guests[name]["counters"]["cpu_seconds"])


def in_lines(show):
    """rows(), but the guests under memvm in one line."""
    small = [0] * 6
    for name, *figures in rows(show):
        if name in show.memvms:
            small = [a + b for a, b in zip(small, figures)]
        else:
            yield (name, *figures)
    if show.memvms:
        yield (f"{len(show.memvms)} memvm", *small)


def print_table(show):
    show.end_progress()
    engine = {"agent": "memd's agent", "kernel": "kernel KSM"}[show.engine]
    print(f"\nMiB, after sharing through {engine}; CPU in seconds, what sharing has cost so far")
    print(f"{'':10}{'promised':>10}{'resident':>10}{'shared':>10}{'zero':>10}{'saved':>10}{'CPU':>8}")
    total = [0] * 6
    for name, *figures in in_lines(show):
        print(f"{name:10}" + "".join(f"{mib(f):>10}" for f in figures[:5]) + f"{figures[5]:8.1f}")
        total = [a + b for a, b in zip(total, figures)]
    sharing = show.status["sharing"]
    print(f"{'total':10}" + "".join(f"{mib(f):>10}" for f in total[:4]) +
          f"{mib(sharing['saved_bytes']):>10}{sharing['cpu_seconds']:8.1f}")
    print(f"\nmeasured by the kernel (PSS of all VMMs and memd): {mib(show.before_bytes)} MiB before, "
          f"{mib(show.after_bytes)} MiB after: {mib(show.before_bytes - show.after_bytes)} MiB less\n",
          flush=True)


# ---- is it true? ----

def close_to(one, other, within=TRUE_WITHIN):
    return abs(one - other) <= within * max(abs(one), abs(other))


def check_identity(show):
    sharing = show.status["sharing"]
    wanted = PAGE * (sharing["pages_sharing"] + sharing["zero_pages"])
    if sharing["saved_bytes"] != wanted:
        raise Failure(f"saved_bytes is {sharing['saved_bytes']}, its parts make {wanted}")
    if sharing["pages_sharing"] == 0:
        raise Failure("nothing is shared")


def check_places(show):
    """Each guest's places sum to the RAM that memd manages for it, which is all of its RAM."""
    for name, guest in show.guests.items():
        managed = sum(block["pages"] for block in guest["blocks"] if block["managed"])
        places = sum(guest["places"].values())
        if places != managed:
            raise Failure(f"{name}: the places sum to {places} pages, {managed} are managed")
        if managed * PAGE < show.promised_bytes(name):
            raise Failure(f"{name}: only {managed} pages are managed")


def check_resident(show):
    told = sum(guest["resident_bytes"] for guest in show.status["guests"])
    seen = sum(machine.pss_bytes([guest.pid]) for guest in show.lab.guests.values())
    if not close_to(told, seen):
        raise Failure(f"memd says the VMMs hold {mib(told)} MiB, the kernel {mib(seen)} MiB")


def check_saved(show):
    """What memd says it saved is what the kernel says is gone. With kernel KSM more may be gone:
    pages of zeros that the kernel drops when it splits a huge page are counted nowhere."""
    saved = show.status["sharing"]["saved_bytes"]
    less = show.before_bytes - show.after_bytes
    if not close_to(saved, less) and not (show.engine == "kernel" and less > saved):
        raise Failure(f"memd says {mib(saved)} MiB are saved, the kernel counts {mib(less)} MiB less")


def check_memvms(show):
    """Each of the guests under memvm shares: at least nine tenths of what all of them have in common."""
    wanted = machine.as_bytes(MEMVM_REGIONS["common"]) // PAGE * 9 // 10
    for name in show.memvms:
        if show.guests[name]["places"]["shared"] < wanted:
            raise Failure(f"{name} shares only {show.guests[name]['places']['shared']} pages")


def check_truth(show):
    checks = [check_identity, check_resident, check_saved]
    if show.engine == "agent":
        checks += [check_places, check_memvms]
    for check in checks:
        check(show)
    agent, kernel = ("the places sum, ", "the same") if show.engine == "agent" else ("", "no less")
    show.say(f"true: {agent}the parts make the savings, and the kernel counts {kernel}")


# ---- a guest moves ----

def start_other_memd(show):
    """What a second host would run, with a socket, state and configuration of its own. Only its own
    configuration says which guest may come and what is started for it."""
    port = free_port()
    show.there.start_memd({"sharing": {"revisit_s": 2},
                           "migration": {"plain": "yes", "listen": f"127.0.0.1:{port}"},
                           **show.there.awaits_qemu(MOVES, show.options.memory)}, {"quickstart": [0]})
    return f"127.0.0.1:{port}"


def watch_migration(show, mover):
    """Until memctl ends; returns the report."""
    def ended():
        if mover.poll() is not None:
            return True
        with contextlib.suppress(Failure):  # memd does not know of it yet
            now = show.lab.get(f"/v1/guests/{MOVES}/migrate")
            show.progress(f"{MOVES} moves: {now['stage']}, {now['pages_left']} of {now['pages']} pages left")
        return False

    wait_for("the migration", ended, MOVE_LIMIT_S, 0.2)
    said, why = mover.communicate()
    report = json.loads(said) if said else {}
    if mover.returncode != 0 or report.get("status") != "completed":
        raise Failure(f"{MOVES} did not move: {why} {report}")
    return report


def move_a_guest(show):
    """Post-copy alone, so that the guest runs at once and its memory follows."""
    if show.engine != "agent":
        show.say("no live migration: it takes the agent")
        return
    address = start_other_memd(show)
    left = show.lab.guests[MOVES]
    show.say(f"{MOVES} moves to a second memd, live, by post-copy, while it verifies its memory")
    report = watch_migration(show, subprocess.Popen(
        [machine.program("memctl"), "--socket", show.lab.socket, "migrate", MOVES, address, "--postcopy-only",
         "--json"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    wait_for("the VMM that it left to end", lambda: not left.is_alive(), 60)
    arrived = show.there.arrived_qemu(MOVES)
    verified = arrived.report()
    show.say(f"{MOVES} has moved: {report['downtime_s'] * 1000:.0f} ms of downtime, {report['total_s']:.1f} s in all, "
             f"the slowest of {report['pages_demand']} faults took {report['fault_us']['max'] / 1000:.1f} ms; "
             f"{verified['pages']} pages verified there, {verified['errors']} errors")
    check_move(report)


def check_move(report):
    """It was a post-copy: the guest ran there, and asked for memory that was still here."""
    if not 0 < report["downtime_s"] < report["total_s"] or report["pages_left"]:
        raise Failure(f"the migration's report can't be right: {report}")
    if report["pages_demand"] == 0 or report["fault_us"]["max"] == 0:
        raise Failure(f"the guest ran only when all of its memory was there: {report}")


STEPS = [say_where, choose_engine, start_memd, boot_guests, start_memvms, measure_before, start_sharing,
         wait_settled, let_guests_verify, collect, print_table, check_truth, move_a_guest]


# ---- leaving ----

def leave_running(show):
    labs = [lab for lab in (show.lab, show.there) if lab.memd]
    for lab in labs:
        lab.keep = True
    stop = os.path.join(show.lab.directory, "stop")
    with open(stop, "w") as file:
        pids = " ".join(str(pid) for lab in labs for pid in reversed(lab.pids()))
        file.write(f"#!/bin/sh\nkill {pids}\nrm -rf {' '.join(lab.directory for lab in labs)}\n")
    os.chmod(stop, 0o755)
    memctl = f"{machine.program('memctl')} --socket {show.lab.socket}"
    show.say(f"left running. To look: {memctl} status; {memctl} guest guest2; "
             f"tail -f {show.lab.directory}/guest2.log. To stop: {stop}")
    if len(labs) > 1:
        show.say(f"the other memd: {machine.program('memctl')} --socket {show.there.socket} guest {MOVES}")


def parse_options():
    parser = argparse.ArgumentParser(prog="quickstart", add_help=False)
    parser.add_argument("--guests", type=int, default=8)
    parser.add_argument("--memory", default="256M")
    parser.add_argument("--budget")
    parser.add_argument("--keep", action="store_true")
    return parser.parse_args()


def stop_on_signal(*_):
    raise KeyboardInterrupt


def main():
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop_on_signal)
    show = Show(parse_options())
    try:
        with contextlib.ExitStack() as labs:
            show.lab, show.there = (labs.enter_context(Lab(outlive=show.options.keep)) for _ in range(2))
            for step in STEPS:
                step(show)
            if show.options.keep:
                leave_running(show)
    except Failure as failure:
        show.say(f"NOT true or not done: {failure}")
        show.say(f"logs: {show.lab.directory}{', ' + show.there.directory if show.there.memd else ''}")
        return 1
    except KeyboardInterrupt:
        show.say("stopped")
        return 130
    show.say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
