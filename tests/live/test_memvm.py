# SPDX-License-Identifier: Apache-2.0
"""memvm: guests under the real /dev/kvm, in a VMM that links libmemd."""
import ctypes
import os
import signal
import subprocess

from lab import Failure, Lab, machine, wait_for
from lab.suite import AGENT, MEMVM, live_test, short_or_full

LIBC = ctypes.CDLL(None, use_errno=True)
TGKILL = 234  # x86-64's, as memvm is

# Of 16 MiB; a MiB below them is the guest's own.
REGIONS = {"common": "6M", "twin": "2M", "zero": "2M", "text": "1M", "unique": "1M", "churn": "512K",
           "hot": "512K", "duty": 20}
COMMON, TWIN, ZERO = 6 * 256, 2 * 256, 2 * 256  # pages


def wait_saved(lab, shared, zero, seconds=120):
    """Until so many pages are saved by sharing, and so many dropped as zeros."""
    def saved():
        sharing = lab.sharing()
        return sharing["pages_sharing"] >= shared and sharing["zero_pages"] >= zero
    wait_for(f"{shared} pages to be shared and {zero} zero pages to be dropped", saved, seconds, 0.3)


def stop_all(lab):
    for guest in lab.guests.values():
        if guest.is_alive():
            guest.stop()


@live_test([AGENT, MEMVM])
def memvm_guest_shares_within_itself():
    with Lab() as lab:
        lab.start_memd()
        guest = lab.start_memvm("alone", **REGIONS)
        guest.wait_ready()
        lab.wait_connected("alone")
        wait_saved(lab, TWIN * 3 // 4 * 9 // 10, ZERO * 9 // 10)
        if machine.maps_library(guest.pid, "libmemd-preload"):
            raise Failure("the agent was preloaded into a VMM that is linked with it")
        if lab.guest_status("alone")["vmm"] != "memvm":
            raise Failure(f"memd takes memvm for {lab.guest_status('alone')['vmm']!r}")
        guest.report()
        stop_all(lab)


@live_test([AGENT, MEMVM])
def memvm_guests_share_in_a_domain():
    with Lab() as lab:
        lab.start_memd(domains={"pair": [0]})
        for name in ("a", "b"):
            lab.start_memvm(name, domain="pair", cpus=2, **REGIONS).wait_ready()
        wait_saved(lab, (COMMON + 2 * TWIN * 3 // 4) * 9 // 10, 2 * ZERO * 9 // 10)
        lab.report_all()
        for guest in lab.guests.values():
            if guest.figure("random-bytes") == 0:
                raise Failure(f"{guest.name} drew nothing from virtio-rng")
        stop_all(lab)


@live_test([AGENT, MEMVM])
def signals_that_kick_vcpus_lose_nothing():
    """Every vCPU is kicked all the time while its pages are frozen, shared, broken and given up."""
    with Lab() as lab:
        lab.start_memd({"sharing": {"revisit_s": 1}}, {"pair": [0]})
        guests = [lab.start_memvm(name, domain="pair", cpus=2, common="4M", flip="2M", lend="1M", hot="1M",
                                  zero="2M", duty=60) for name in ("a", "b")]
        for guest in guests:
            guest.wait_ready()
        threads = [(guest.pid, tid) for guest in guests for tid in guest.vcpu_threads()]
        goal = short_or_full(200, 5000)

        def kick_until_merged():
            for pid, tid in threads * 50:
                kick(pid, tid)
            counters = [lab.guest_status(guest.name)["counters"] for guest in guests]
            return sum(each["unmerges"] for each in counters) >= goal
        wait_for(f"{goal} shares to be broken under kicks", kick_until_merged, 240, 0.01)
        lab.report_all()
        stop_all(lab)


def kick(pid, tid):
    """tgkill(): Python's own can't name a thread of another process."""
    LIBC.syscall(TGKILL, pid, tid, signal.SIGUSR1)


@live_test([AGENT, MEMVM])
def saved_memvm_guest_runs_on_and_verifies():
    """What is shared when it is saved is in the file, and is shared again after it was loaded."""
    with Lab() as lab:
        lab.start_memd()
        place = os.path.join(lab.directory, "machine")
        guest = lab.start_memvm("first", cpus=2, save=place, **REGIONS)
        guest.wait_ready()
        wait_saved(lab, TWIN * 3 // 4 * 9 // 10, ZERO * 9 // 10)
        guest.wait_rounds(1)
        before = guest.report()
        guest.save()
        again = lab.start_memvm("second", load=place)
        lab.wait_connected("second")
        again.wait_rounds(2)
        after = again.report()
        if int(after["rounds"]) < int(before["rounds"]) or \
                int(after["random-bytes"]) <= int(before["random-bytes"]):
            raise Failure(f"the loaded machine did not go on: {before} and then {after}")
        wait_saved(lab, TWIN * 3 // 4 * 9 // 10, ZERO * 9 // 10)
        again.report()
        stop_all(lab)


@live_test([MEMVM])
def memvm_runs_on_when_memd_is_not_to_be_had():
    environment = {**os.environ, "MEMD_AGENT_SOCKET": "/nowhere", "MEMD_TOKEN": "no token"}
    done = subprocess.run([machine.program("memvm"), machine.program("bare-guest"), "common=1M"], text=True,
                          input="report 1\nstop 2\n", stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=environment, timeout=60)
    if done.returncode != 0 or "errors=0" not in done.stdout:
        raise Failure(f"ended with {done.returncode}: {done.stdout!r}")
    if "runs without memd" not in done.stderr:
        raise Failure(f"says nothing of it: {done.stderr!r}")


@live_test([MEMVM])
def crashing_memvm_guest_says_where():
    done = subprocess.run([machine.program("memvm"), machine.program("bare-guest"), "crash=1"], text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=60)
    if done.returncode != 9 or "CRASH exception=6" not in done.stdout:
        raise Failure(f"ended with {done.returncode}: {done.stdout!r}")
