# SPDX-License-Identifier: Apache-2.0
"""The same guests under one engine or the other.

A fleet boots and fills its memory while its engine is off; start() is the engine's first moment,
at full speed. For memd "off" means that memd, once all agents have said hello, is stopped by
SIGTERM (the agents then wait, and guests run on alone), and start() starts it again. memd and ksmd
never run at the same time."""
import contextlib
import time

from lab import PAGE, Failure, Lab, machine
from lab.errors import wait_for

from . import ksmd, procs, ram

KERNEL_AND_QEMU = 76 << 20  # of a guest's RAM, what its kernel and initramfs need for themselves
DOMAIN = "bench"
SAMPLE_S = 0.15
SMART_SCAN_PASSES = 8  # the longest that ksmd leaves a page out

# In per cent of the rest. Much in common, in long runs and page by page (mosaic); some of its own;
# an eighth in motion.
UNDER_LOAD = {"common": 42, "zero": 12, "unique": 12, "twin": 8, "mosaic": 4, "churn": 6, "hot": 6}
# Virtual CPU a guest uses, in per cent: 8 guests leave more than a core of two for the engines.
LOAD_DUTY = 10
# An interpreted guest that gets no CPU for a moment takes its timer for broken, and panics.
KERNEL_WORDS = "no_timer_check"


def regions(memory, parts, **options):
    room = machine.as_bytes(memory) - KERNEL_AND_QEMU
    if room < 16 << 20:
        raise SystemExit("bench: --memory must be 96M or more")
    sizes = {name: room * percent // 100 // PAGE * PAGE for name, percent in parts.items()}
    return {**sizes, **options}


class Fleet:
    """Guests of one engine in one Lab. `guests` gain `blocks`, their RAM in their VMM."""

    name = None

    def __init__(self, lab):
        self.lab = lab
        self.guests = []

    # What an engine has to say:
    def boot(self, count, memory, content):
        """Starts the guests; they have not booted yet, and the engine is off."""
        raise NotImplementedError

    def start(self):
        """The engine runs, as fast as it may. Returns engine_cpu() from that moment on."""
        raise NotImplementedError

    def slow_down(self, pass_s):
        """From now on a pass over all memory takes pass_s, or comes every pass_s. May take some
        passes."""
        raise NotImplementedError

    def saved_pages(self):
        raise NotImplementedError

    def engine_cpu(self):
        """{part: CpuSum}: the engine's CPU time from now on, by who uses it."""
        raise NotImplementedError

    def wait_pass(self):
        """Until the engine's pass ends, if it has passes of its own."""

    def rest(self, seconds):
        """Lets time pass, at least so much and whole passes, and asks the engine nothing. Returns
        how long it was, and how long a pass took."""
        raise NotImplementedError

    def stop(self):
        """The engine is off, and what was set in the kernel for it is as before."""

    # The rest is common:
    def wait_filled(self):
        for guest in self.guests:
            guest.wait_ready(400)

    def pids(self):
        return [guest.pid for guest in self.guests]

    def look_at_blocks(self):
        """Sets every guest's blocks: its RAM as its engine sees it now."""
        for guest in self.guests:
            guest.blocks = ram.mergeable_blocks(guest.pid)

    def own_threads(self):
        """The guests' threads, without an agent's: [(pid, tid)]"""
        return [(pid, tid) for pid in self.pids()
                for tid in set(procs.threads(pid)) - set(procs.agent_threads(pid))]

    def pause_guests(self):
        """From now on the guests verify their memory and write nothing."""
        for guest, tag in [(guest, guest.ask("pause")) for guest in self.guests]:
            guest.console.wait(f"{guest.name} to pause",
                               lambda line, tag=tag: line.endswith(f"paused tag={tag}"), 180)

    def wait_settled(self, quiet_s=6, gain=0.005, limit_s=120):
        """Until the gain of the last quiet_s seconds was small."""
        seen = []
        start = time.monotonic()

        def settled():
            now, saved = time.monotonic(), self.saved_pages()
            seen.append((now, saved))
            past = max((was for when, was in seen if now - when >= quiet_s), default=None)
            return past and saved <= past * (1 + gain)

        wait_for(f"{self.name} to settle", settled, limit_s, 0.5)
        return time.monotonic() - start


class MemdFleet(Fleet):
    name = "memd"
    tuning = {"revisit_s": 1, "cpu_percent": 100}

    def boot(self, count, memory, content):
        self.lab.start_memd({"sharing": self.tuning}, {DOMAIN: [0]})
        self.alone = procs.smaps(self.lab.memd.pid)  # memd without a guest
        for number in range(1, count + 1):
            self.guests.append(self.lab.start_guest(f"memd{number}", memory=memory, domain=DOMAIN,
                                                    seed=number, append=KERNEL_WORDS,
                                                    **content))
        self.lab.wait_connected(*(guest.name for guest in self.guests))
        self._wait_managed(machine.as_bytes(memory))
        self.lab.memd.terminate()
        self.lab.memd.wait(30)

    def look_at_blocks(self):
        """The blocks that memd manages. A VMM announces them one after the other, and some may
        grow while its guest boots."""
        for guest in self.guests:
            guest.blocks = [(block["hva"], block["hva"] + block["pages"] * PAGE)
                            for block in self.lab.guest_status(guest.name)["blocks"]
                            if block["managed"]]

    def _wait_managed(self, memory_bytes):
        def all_of_them():
            self.look_at_blocks()
            return all(sum(end - start for start, end in guest.blocks) >= memory_bytes
                       for guest in self.guests)
        try:
            wait_for("their RAM to be managed", all_of_them, 30)
        except Failure:
            whole = self.lab.guest_status(self.guests[0].name)
            raise Failure(f"memd does not manage the guests' RAM: {whole['reason']!r}, "
                          f"{whole['blocks']}") from None

    def start(self):
        agents = procs.CpuSum(self._agents)
        self.lab.start_memd()
        return {"daemon_s": procs.CpuSum(self._daemon, from_zero=True), "agents_s": agents}

    def slow_down(self, pass_s):
        self.tuning = {**self.tuning, "revisit_s": pass_s}
        self.lab.reload_memd({"sharing": self.tuning}, {DOMAIN: [0]})

    def saved_pages(self):
        sharing = self.lab.sharing()
        return sharing["pages_sharing"] + sharing["zero_pages"]

    def _agents(self):
        return [(pid, tid) for pid in self.pids() for tid in procs.agent_threads(pid)]

    def _daemon(self):
        memd = self.lab.memd.pid
        return [(memd, tid) for tid in set(procs.threads(memd)) - set(procs.status_readers(memd))]

    def engine_cpu(self):
        return {"daemon_s": procs.CpuSum(self._daemon), "agents_s": procs.CpuSum(self._agents)}

    def rest(self, seconds):
        start = time.monotonic()
        time.sleep(seconds)
        return time.monotonic() - start, self.tuning["revisit_s"]


class KsmdFleet(Fleet):
    name = "ksmd"

    def __init__(self, lab, engine):
        super().__init__(lab)
        self.ksmd = engine

    def boot(self, count, memory, content):
        for number in range(1, count + 1):
            self.guests.append(self.lab.start_guest(f"ksmd{number}", memory=memory, plain=True,
                                                    seed=number, append=KERNEL_WORDS,
                                                    **content))

    def wait_filled(self):
        super().wait_filled()
        self.look_at_blocks()

    def start(self):
        cpu = self.engine_cpu()
        self.ksmd.start(ksmd.FULL_SPEED)
        return cpu

    def slow_down(self, pass_s):
        sleep_s = 0.02
        pages = self.ksmd.pages_of_a_pass(SMART_SCAN_PASSES)
        self.ksmd.start({"sleep_millisecs": str(round(1000 * sleep_s)),
                         "pages_to_scan": str(max(1, round(pages * sleep_s / pass_s)))})

    def saved_pages(self):
        """Comparable with memd's pages_sharing + zero_pages. As shipped ksmd does not drop zero pages
        but merges them with each other; yet when it splits a huge page, Linux 6.12 and later drop
        those of its pages that are zeros, and count them nowhere."""
        return ksmd.number("pages_sharing") + sum(ram.zero_page_users(guest.pid, guest.blocks)
                                                  for guest in self.guests)

    def engine_cpu(self):
        thread = procs.kernel_thread("ksmd")
        return {"ksmd_s": procs.CpuSum(lambda: [(thread, thread)])}

    def wait_pass(self):
        self.ksmd.wait_pass()

    def rest(self, seconds):
        start, passes = time.monotonic(), 0
        while time.monotonic() - start < seconds:
            self.wait_pass()
            passes += 1
        return time.monotonic() - start, (time.monotonic() - start) / passes

    def stop(self):
        self.ksmd.stop()


class Machine:
    """Where fleets come from, and kernel KSM, which is opened when the first figure needs it."""

    def __init__(self):
        self._stack = contextlib.ExitStack()
        self._ksmd = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stack.close()

    def ksmd(self):
        if not self._ksmd:
            self._ksmd = ksmd.Ksmd()
            self._stack.callback(self._ksmd.close)
        return self._ksmd

    @staticmethod
    def lab():
        return Lab()

    @contextlib.contextmanager
    def fleet(self, name):
        """An empty fleet in a Lab of its own, both gone at the end: first the guests, or ksmd would
        have to give each of them its pages back."""
        fleet = None
        try:
            with Lab() as lab:
                fleet = MemdFleet(lab) if name == "memd" else KsmdFleet(lab, self.ksmd())
                yield fleet
        finally:
            if fleet:
                fleet.stop()
