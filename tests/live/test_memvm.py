# SPDX-License-Identifier: Apache-2.0
"""memvm: guests under the real /dev/kvm, in a VMM that links libmemd."""
import ctypes
import itertools
import json
import os
import random
import signal
import subprocess
import time

from lab import Failure, Lab, Skip, machine, wait_for
from lab.suite import AGENT, FULL, MEMVM, live_test, short_or_full

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
        status, said, why = lab.memctl("analyze", "--no-compression", "--json", "guest:alone")
        if status != 0:  # it has absent pages that userfaultfd has left its markers at
            raise Failure(f"analyze: {why}")
        if json.loads(said)["pages"] != sum(lab.guest_status("alone")["places"].values()):
            raise Failure("analyze has not looked at all of the guest's pages")
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
        # Its counters go on where they were: each vCPU does a round, and the first draws once in each.
        for figure in ("rounds", "random-bytes"):
            wait_for(f"the loaded machine to go on from its {figure} of {before[figure]}",
                     lambda figure=figure: again.figure(figure) > int(before[figure]), 180)
        if again.is_ready():
            raise Failure(f"the loaded machine began again: {again.console.lines()[:3]}")
        wait_saved(lab, TWIN * 3 // 4 * 9 // 10, ZERO * 9 // 10)
        again.report()
        stop_all(lab)


def run_memvm(*words, seconds=60, **options):
    return subprocess.run([machine.program("memvm"), *words], text=True, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=seconds, **options)


@live_test([MEMVM])
def memvm_guest_goes_through_its_hooks():
    """Paused, saved and loaded as memd does it; pauses that can't be are refused, and don't hang."""
    done = subprocess.run([machine.program("move_kvm"), machine.program("bare-guest")], text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode == 77:
        raise Skip(done.stdout.strip())
    if done.returncode != 0:
        raise Failure(f"ended with {done.returncode}: {done.stdout.strip()[-600:]}")


def all_absent(places):
    return places["absent"] == sum(places.values()) == (16 << 20) // 4096


@live_test([AGENT, MEMVM])
def memvm_that_waits_for_a_machine_does_not_run():
    """Its agent is there, its RAM is known and empty; it saves nothing, and ends when it is told to."""
    with Lab() as lab:
        lab.start_memd()
        place = os.path.join(lab.directory, "machine")
        for name, options, status in (("plain", [], 0), ("saving", ["--save", place], 1)):
            guest = lab.start_memvm(name, cpus=2, incoming=True, memvm_options=options)
            lab.wait_connected(name)
            wait_for("RAM that nothing has touched", lambda: all_absent(lab.guest_status(name)["places"]), 30)
            wait_for("the vCPUs' threads", lambda: len(guest.vcpu_threads()) == 2, 30)
            if guest.console.lines():
                raise Failure(f"{name}: the guest says {guest.console.lines()[:3]}")
            guest.process.terminate()
            if guest.process.wait(60) != status or os.path.exists(place):
                raise Failure(f"{name}: ended with {guest.process.returncode}: {guest.stderr()[-400:]!r}")


@live_test([AGENT, MEMVM])
def restored_memvm_guest_runs_before_its_memory_was_read():
    """Its pages come when it touches them, and by themselves; then the file may go, and they are shared."""
    with Lab() as lab:
        lab.start_memd()
        place = os.path.join(lab.directory, "machine")
        guest = lab.start_memvm("first", memory="64M", cpus=2, save=place, common="24M", twin="8M", unique="16M",
                                hot="4M", churn="2M", zero="2M", duty=50)
        guest.wait_ready()
        guest.wait_rounds(1)
        before = guest.report()
        guest.save()
        again = lab.start_memvm("second", restore=place)
        lab.wait_connected("second")
        after = again.report()
        if int(after["rounds"]) < int(before["rounds"]):
            raise Failure(f"the restored machine did not go on: {before} and then {after}")
        wait_for("its memory to be read", lambda: lab.guest_status("second")["places"]["remote"] == 0, 120)
        os.unlink(place)
        again.report()
        wait_saved(lab, 8 * 256 * 3 // 4 * 9 // 10, 2 * 256 * 9 // 10)
        again.report()
        stop_all(lab)


@live_test([AGENT, MEMVM])
def memvm_guest_whose_file_was_cut_short_does_not_start():
    """No page of zeros is ever shown in place of one that is lost."""
    with Lab() as lab:
        lab.start_memd()
        place = os.path.join(lab.directory, "machine")
        lab.start_memvm("first", save=place, **REGIONS).wait_ready()
        lab.guests["first"].save()
        with open(place, "r+b") as file:
            size = os.path.getsize(place)
            file.truncate(2 << 20)
        done = run_memvm("--restore", place)
        if done.returncode != 1 or "no machine that this memvm has saved" not in done.stderr:
            raise Failure(f"a file of {2 << 20} bytes, not {size}: ended with {done.returncode}: {done.stderr!r}")


@live_test([MEMVM])
def memvm_machine_has_one_origin():
    image = machine.program("bare-guest")
    for words in ((), ("--incoming", image), ("--incoming", "--load", "/nowhere"), ("--incoming", "--restore", "/nowhere"), ("--load", "/nowhere", image)):
        done = run_memvm(*words)
        if done.returncode != 2 or "Try memvm --help" not in done.stderr:
            raise Failure(f"{words}: ended with {done.returncode}: {done.stderr!r}")
    done = run_memvm("--incoming")
    if done.returncode != 1 or "without memd nothing can come" not in done.stderr:
        raise Failure(f"--incoming without memd: ended with {done.returncode}: {done.stderr!r}")


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


# ---- vCPUs against merges, in one process ----

def race(*options):
    """(exit status, what it said)"""
    done = subprocess.run([machine.program("race_kvm"), "--image", machine.program("bare-guest"), *options],
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode == 77:
        raise Skip(done.stdout.strip())
    return done.returncode, done.stdout.strip()


@live_test([MEMVM], limit_minutes=5, full_minutes=90)
def vcpus_lose_nothing_to_merges():
    status, said = race("--merges", str(short_or_full(20_000, 1_000_000)))
    if FULL:
        print(said, flush=True)
    if status != 0:
        raise Failure(f"ended with {status}: {said}")


@live_test([MEMVM])
def without_the_freeze_a_vcpus_write_is_lost():
    status, said = race("--merges", "2000000", "--no-freeze")
    if status != 1 or "CORRUPT" not in said:
        raise Failure(f"the race test can't fail: ended with {status}: {said}")


# ---- a hundred guests, and deaths ----

MANY = 100
IN_MANY = {"common": "4M", "twin": "1M", "zero": "1M", "unique": "256K", "hot": "64K", "duty": 1, "every": 10}
MANY_COMMON = 4 * 256


class Crowd:
    """Guests come and go; each has a name of its own."""

    def __init__(self, lab):
        self.lab = lab
        self._numbers = itertools.count(1)

    def add(self, count):
        return [self.lab.start_memvm(f"m{next(self._numbers)}", domain="many", **IN_MANY) for _ in range(count)]

    def living(self):
        return [guest for guest in self.lab.guests.values() if guest.is_alive()]

    def wait_shared(self):
        """Until nearly everything that all have in common is there once."""
        living = self.living()
        for guest in living:
            guest.wait_ready()
        self.lab.wait_connected(*[guest.name for guest in living])
        self.lab.wait_shared(MANY_COMMON * (len(living) - 1) * 9 // 10)

    def kill_some(self, chance):
        """memd (which comes back at once), or some guests (others take their places)."""
        if chance.random() < 0.5:
            self.lab.kill_memd()
            self.lab.start_memd()
            return
        victims = chance.sample(self.living(), chance.randint(1, 5))
        for guest in victims:
            guest.kill()
        self.add(len(victims))


def nothing_of_a_store_is_left(lab):
    return lab.sharing()["pages_shared"] == 0 and not machine.memfds([lab.memd.pid])


@live_test([AGENT, MEMVM], limit_minutes=6, full_minutes=60)
def hundred_memvm_guests_share_through_deaths():
    seed = int(os.environ.get("MEMD_SEED", random.randrange(1 << 30)))
    chance = random.Random(seed)
    print(f"hundred_memvm_guests_share_through_deaths: MEMD_SEED={seed}", flush=True)
    with Lab() as lab:
        lab.start_memd({"host": {"grace_s": 5}}, {"many": [0]})
        crowd = Crowd(lab)
        crowd.add(MANY)
        crowd.wait_shared()
        for _ in range(short_or_full(6, 200)):
            time.sleep(chance.uniform(0, 1))  # the random moment, no synchronisation
            crowd.kill_some(chance)
        crowd.wait_shared()
        lab.report_all()
        for guest in crowd.living():
            guest.stop()
        wait_for("the segments to be retired", lambda: nothing_of_a_store_is_left(lab), 60, 0.5)

