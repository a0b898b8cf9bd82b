# SPDX-License-Identifier: Apache-2.0
"""Guests share memory, what they see stays right, and nobody shares who may not."""
import os
import subprocess
import sys

from lab import Failure, Lab, PAGE, machine, wait_for
from lab.suite import AGENT, live_test, short_or_full

MIB_PAGES = (1 << 20) // PAGE


def check_figures(lab):
    """The figures that must agree at every moment, while the guests write."""
    sharing = lab.sharing()
    if sharing["saved_bytes"] != PAGE * (sharing["pages_sharing"] + sharing["zero_pages"]):
        raise Failure(f"saved_bytes is not the sum of its parts: {sharing}")
    for guest in lab.guests.values():
        if guest.is_alive():
            check_places(lab, guest.name)


def check_places(lab, name):
    told = lab.guest_status(name)
    managed = sum(block["pages"] for block in told["blocks"] if block["managed"])
    if sum(told["places"].values()) != managed:
        raise Failure(f"{name}: places {told['places']} don't sum to {managed} managed pages")


@live_test([AGENT])
def one_guest_shares_within_itself():
    with Lab() as lab:
        lab.start_memd()
        guest = lab.start_guest("alone", twin="32M", zero="16M", unique="8M", churn="4M", hot="4M")
        guest.wait_ready()
        lab.wait_shared(24 * MIB_PAGES * 95 // 100)
        wait_for("zero pages to be dropped",
                 lambda: lab.sharing()["zero_pages"] >= 16 * MIB_PAGES * 95 // 100)
        guest.report()
        check_figures(lab)


@live_test([AGENT])
def two_guests_share_and_write():
    with Lab() as lab:
        lab.start_memd(domains={"pair": [0]})
        guests = [lab.start_guest(name, domain="pair", common="64M", unique="8M", zero="8M",
                                  churn="16M", hot="8M", mosaic="4M") for name in ("left", "right")]
        for guest in guests:
            guest.wait_ready()
        lab.wait_shared(64 * MIB_PAGES * 95 // 100)
        for _ in range(short_or_full(3, 30)):
            for guest in guests:
                guest.wait_rounds(5)
            lab.report_all()
            check_figures(lab)
        broken = [lab.guest_status(guest.name)["counters"]["unmerges"] for guest in guests]
        if not all(broken):
            raise Failure("no share was ever broken: the test tested nothing")


@live_test([AGENT])
def memory_is_really_less_by_what_memd_says():
    with Lab() as lab:
        lab.start_memd({"sharing": {"revisit_s": 600}}, {"pair": [0]})
        for name in ("left", "right"):
            lab.start_guest(name, domain="pair", common="80M", zero="24M", duty=2)
        for guest in lab.guests.values():
            guest.wait_ready()
        lab.wait_connected("left", "right")
        before = machine.pss_bytes(lab.pids()) + lab.sharing()["saved_bytes"]
        lab.reload_memd({"sharing": {"revisit_s": 1}}, {"pair": [0]})
        lab.wait_shared(80 * MIB_PAGES * 95 // 100)
        saved = lab.sharing()["saved_bytes"]
        less = before - machine.pss_bytes(lab.pids())
        if not 0.8 * saved < less < 1.25 * saved:
            raise Failure(f"{saved} bytes are said to be saved, {less} are gone")


@live_test([AGENT])
def guests_of_different_domains_share_only_zeros():
    with Lab() as lab:
        lab.start_memd(domains={"one": [0], "two": [0]})
        guests = [lab.start_guest(name, domain=name, common="48M", twin="16M", zero="16M")
                  for name in ("one", "two")]
        for guest in guests:
            guest.wait_ready()
        # Both have been scanned from end to end when each shares its twins within itself.
        for guest in guests:
            wait_for(f"{guest.name} to share its twins", lambda g=guest: lab.guest_status(g.name)
                     ["places"]["shared"] >= 16 * MIB_PAGES * 95 // 100, 120)
            guest.wait_rounds(10)
        both = machine.memfds([guests[0].pid]) & machine.memfds([guests[1].pid])
        if both:
            raise Failure(f"guests of different domains map the same memory: {both}")
        # Each has its twins within itself, and some duplicates of its kernel's.
        if lab.sharing()["pages_sharing"] > (2 * 12 + 48 // 2) * MIB_PAGES:
            raise Failure(f"more is shared than each has within itself: {lab.sharing()}")
        if lab.sharing()["zero_pages"] < 2 * 16 * MIB_PAGES * 95 // 100:
            raise Failure("zero pages were not dropped")
        lab.report_all()


@live_test([AGENT])
def guests_without_a_domain_share_only_within_themselves():
    with Lab() as lab:
        lab.start_memd()
        guests = [lab.start_guest(name, common="48M", twin="16M") for name in ("one", "two")]
        for guest in guests:
            guest.wait_ready()
        lab.wait_shared(2 * 12 * MIB_PAGES * 95 // 100)
        if machine.memfds([guests[0].pid]) & machine.memfds([guests[1].pid]):
            raise Failure("guests without a domain map the same memory")
        lab.report_all()


@live_test([AGENT])
def uid_that_a_domain_does_not_list_shares_within_itself_only():
    """Root registers it for the domain; what counts is who the agent is."""
    with Lab() as lab:
        lab.start_memd(domains={"ours": [0]})
        member = lab.start_guest("member", domain="ours", common="48M", twin="16M")
        stranger = lab.start_guest("stranger", domain="ours", uid=54321, common="48M", twin="16M")
        for guest in (member, stranger):
            guest.wait_ready()
            wait_for(f"{guest.name} to share its twins", lambda g=guest: lab.guest_status(g.name)
                     ["places"]["shared"] >= 16 * MIB_PAGES * 95 // 100, 120)
            guest.wait_rounds(10)
        if machine.memfds([member.pid]) & machine.memfds([stranger.pid]):
            raise Failure("the stranger maps memory of the domain")
        if lab.guest_status("stranger")["domain"] == "ours":
            raise Failure("the stranger is in the domain")
        lab.report_all()


TRY_TO_WRITE = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
tries = []
def attempt(name, action):
    try:
        action()
        tries.append(name)
    except OSError:
        pass
def punch(fd):
    if libc.fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(4096)):
        raise OSError(ctypes.get_errno(), "fallocate")
for flags, how in ((os.O_RDWR, "rw"), (os.O_RDONLY, "ro")):
    try:
        fd = os.open(sys.argv[1], flags)
    except OSError:
        continue
    attempt(how + " write", lambda: os.pwrite(fd, b"x", 0))
    attempt(how + " truncate", lambda: os.ftruncate(fd, 0))
    attempt(how + " grow", lambda: os.ftruncate(fd, 1 << 30))
    attempt(how + " punch", lambda: punch(fd))
    attempt(how + " map", lambda: mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_WRITE))
print(",".join(tries))
"""


def segment_descriptors(pid):
    """Paths of the VMM's descriptors of store segments: memfds of memd that are mapped privately
    over guest RAM (the ring is mapped shared)."""
    with open(f"/proc/{pid}/maps") as file:
        inodes = {int(line.split()[4]) for line in file
                  if "/memfd:memd" in line and line.split()[1].endswith("p")}
    paths = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        if os.readlink(path).startswith("/memfd:memd") and os.stat(path).st_ino in inodes:
            paths.append(path)
    return paths


@live_test([AGENT])
def segment_cannot_be_changed_by_whoever_holds_it():
    with Lab() as lab:
        lab.start_memd()
        guest = lab.start_guest("holder", twin="16M")
        guest.wait_ready()
        lab.wait_shared(10 * MIB_PAGES)
        paths = segment_descriptors(guest.pid)
        if not paths:
            raise Failure("the VMM holds no segment by descriptor: the test tested nothing")
        for path in paths:
            done = subprocess.run([sys.executable, "-c", TRY_TO_WRITE, path], check=True,
                                  stdout=subprocess.PIPE, text=True)
            if done.stdout.strip():
                raise Failure(f"{path}, as root: {done.stdout.strip()} was possible")
        guest.report()


@live_test([AGENT])
def detached_guest_holds_nothing_of_the_store():
    with Lab() as lab:
        lab.start_memd(domains={"pair": [0]})
        guests = [lab.start_guest(name, domain="pair", common="48M", zero="16M", hot="4M")
                  for name in ("stays", "leaves")]
        for guest in guests:
            guest.wait_ready()
        lab.wait_shared(48 * MIB_PAGES * 95 // 100)
        status, _, words = lab.memctl("detach", "leaves")
        if status != 0:
            raise Failure(f"memctl detach ended with {status}: {words}")
        with open(f"/proc/{guests[1].pid}/maps") as file:
            left = [line for line in file if "/memfd:memd" in line]
        if left:
            raise Failure(f"the detached VMM still maps memd's memory: {left[0].strip()}")
        guests[1].wait_rounds(3)
        lab.report_all()
