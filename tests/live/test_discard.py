# SPDX-License-Identifier: Apache-2.0
"""Memory that a guest gave back must come back as zeros. With init_on_free=1 the guest's kernel
zeroes pages when they are freed and trusts them to be zero when they are used again, so whatever a
wrong discard brings back (a store page for one) is seen by the next program of the guest."""
import contextlib
import os

from lab import Failure, Lab, PAGE, Skip, machine, wait_for
from lab.suite import AGENT, live_test, short_or_full

LEND_PAGES = (100 << 20) // PAGE
REPORTED_PAGES = LEND_PAGES * 6 // 10  # free page reporting leaves scattered pages to the guest


def start_reporting_guest(lab, memory, **options):
    """So little memory that what was given back has to be taken again."""
    guest = lab.start_guest(
        "giver", memory=memory, lend="100M", unique="8M", duty=3, **options,
        append="init_on_free=1 init_on_alloc=0 transparent_hugepage=never",
        devices=["-device", "virtio-balloon-pci,free-page-reporting=on"])
    guest.wait_ready()
    return guest


def share_then_free(lab, guest):
    """The lend block is shared (three of four twins), then given back to the guest's kernel."""
    guest.command("fill", "filled")
    lab.wait_shared(LEND_PAGES * 3 // 4 * 9 // 10)
    guest.command("free", "freed")


def take(guest):
    return int(guest.command("take", "took")["dirty"])


@live_test([AGENT], limit_minutes=8, full_minutes=40)
def discarded_pages_come_back_as_zeros():
    with Lab() as lab:
        lab.start_memd()
        guest = start_reporting_guest(lab, "216M")
        for number in range(short_or_full(4, 40)):
            share_then_free(lab, guest)
            wait_for("the freed memory to be reported", lambda: lab.guest_status("giver")["places"]
                     ["absent"] >= REPORTED_PAGES, 120, 0.3)
            dirty = take(guest)
            if dirty:
                raise Failure(f"round {number}: {dirty} of {LEND_PAGES} fresh pages are not zero")
        guest.report()


MAP_LIMIT = "/proc/sys/vm/max_map_count"
FEWEST_MAPPINGS = 4000  # what we dare to leave to the rest of the machine


@contextlib.contextmanager
def no_mapping_left(pid):
    """While it lasts the VMM can't get another mapping. Then a share is not broken by moving a page
    over it, but by the kernel's silent copy, which lies in front of the store's page: what a wrong
    discard brings to light. The limit is the whole machine's, hence the floor."""
    with open(MAP_LIMIT) as file:
        before = file.read()
    if machine.vmas(pid) < FEWEST_MAPPINGS:
        raise Failure(f"the VMM has only {machine.vmas(pid)} mappings: the limit would hurt others")
    try:
        write(MAP_LIMIT, str(machine.vmas(pid)))
        yield
    finally:
        write(MAP_LIMIT, before)


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def needs_map_limit():
    if not os.access(MAP_LIMIT, os.W_OK):
        raise Skip(f"{MAP_LIMIT} can't be written here")


def take_after_silent_copies(lab, guest):
    """How many fresh pages are not zero after the guest gave back what the kernel had copied."""
    guest.command("fill", "filled")
    wait_for("the mosaic to be shared", lambda: machine.vmas(guest.pid) > FEWEST_MAPPINGS + 500, 120)
    lab.wait_shared(LEND_PAGES * 3 // 4 * 9 // 10)
    with no_mapping_left(guest.pid):
        guest.command("free", "freed")
        wait_quiet(guest)
    return take(guest)


def wait_quiet(guest):
    """Until free page reporting has done what it does: every 2 s, and the resident set tells."""
    seen = []

    def quiet():
        seen.append(machine.rollup(guest.pid)["Rss"])
        return len(seen) > 8 and max(seen[-8:]) - min(seen[-8:]) < 1 << 20
    wait_for("free page reporting", quiet, 60, 1)


@live_test([AGENT], limit_minutes=8)
def discarded_silent_copies_come_back_as_zeros():
    needs_map_limit()
    with Lab() as lab:
        lab.start_memd()
        guest = start_reporting_guest(lab, "256M", mosaic="40M")
        for _ in range(short_or_full(1, 10)):
            dirty = take_after_silent_copies(lab, guest)
            if dirty:
                raise Failure(f"{dirty} of {LEND_PAGES} fresh pages are not zero")
        guest.report()


@live_test([AGENT], limit_minutes=8)
def without_interposition_discarded_pages_show_the_store():
    """The test above can fail: with an agent that leaves the VMM's discards alone it does."""
    needs_map_limit()
    agent = "libmemd-preload-no-interpose.so"
    if not os.path.exists(machine.library(agent)):
        raise Skip(f"no {agent} in this build")
    with Lab() as lab:
        lab.start_memd()
        guest = start_reporting_guest(lab, "256M", mosaic="40M", agent=agent)
        for _ in range(3):
            if take_after_silent_copies(lab, guest):
                return
        raise Failure("no fresh page was dirty: the discard tests would not notice anything")
