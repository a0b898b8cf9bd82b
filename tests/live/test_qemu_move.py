# SPDX-License-Identifier: Apache-2.0
"""Stock QEMU moves nothing but the state of its devices (vmm-hooks/qemu/migrate.c); the tests' own
program (qemu_move.c) copies the RAM in place of memd's agents."""
import json
import os
import subprocess

from lab import Failure, Lab, machine, wait_for
from lab.qmp import Qmp, qmp_devices
from lab.suite import AGENT, live_test

MEMORY = 160 << 20
REGIONS = {"twin": "24M", "unique": "16M", "hot": "8M", "zero": "8M", "duty": 40, "every": 1}


def move(*words):
    """(exit status, what qemu_move said)"""
    done = subprocess.run([machine.program("qemu_move"), *map(str, words)], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    return done.returncode, done.stdout.strip()


def moved(*words):
    status, said = move(*words)
    if status != 0:
        raise Failure(f"qemu_move {words[0]}: {said}")
    return json.loads(said)


def qmp_path(lab, name):
    """The monitor that memctl run gave it."""
    return os.path.join(lab.directory, f"{name}.qmp")


def start(lab, name, run_options=(), **regions):
    """A guest with a monitor for this test besides the one that memctl run makes."""
    path = os.path.join(lab.directory, f"{name}.test")
    guest = lab.start_guest(name, memory="160M", devices=qmp_devices(path), run_options=run_options,
                            seed=7, **(regions or REGIONS))
    return guest, Qmp(path)


def ram_address(monitor):
    said = monitor.run("human-monitor-command", **{"command-line": "gpa2hva 0x0"})
    return said.split()[-1]


def go(lab, source, destination, *words):
    """Moves the guest and says what it took; the process at the source ends."""
    sides = []
    for guest, monitor in (source, destination):
        sides += [qmp_path(lab, guest.name), guest.pid, ram_address(monitor)]
    figures = moved("go", *sides, MEMORY, *words)
    wait_for("the source's QEMU to end", lambda: not source[0].is_alive(), 60)
    return figures


@live_test([AGENT])
def stock_qemu_guest_moves_with_its_memory_left_to_others():
    """It stays twice before it goes: what was begun is taken back, and nobody notices."""
    with Lab() as lab:
        lab.start_memd()
        source = start(lab, "source")
        source[0].wait_ready()
        for _ in range(2):
            if moved("stay", qmp_path(lab, "source"))["state_bytes"] > 4 << 20:
                raise Failure("QEMU has saved more than the state of a few devices")
        on = [cap["capability"] for cap in source[1].run("query-migrate-capabilities") if cap["state"]]
        if "x-ignore-shared" in on:
            raise Failure(f"what was changed for the migration was not put back: {on}")
        source[0].wait_rounds(2)
        source[0].report()
        destination = start(lab, "destination", run_options=["--incoming"])
        lab.wait_connected("source", "destination")
        figures = go(lab, source, destination)
        if figures["state_bytes"] > 4 << 20:
            raise Failure(f"QEMU has moved more than the state of a few devices: {figures}")
        destination[0].wait_rounds(2)
        destination[0].report()
        if any("ready" in line for line in destination[0].console.lines()):
            raise Failure("the guest at the destination has begun anew")
        lab.wait_shared(18 * 256 * 9 // 10)
        destination[0].report()


@live_test([AGENT])
def stock_qemu_guest_notices_when_a_page_stays_behind():
    with Lab() as lab:
        lab.start_memd()
        source, destination = start(lab, "source"), start(lab, "destination", run_options=["--incoming"])
        source[0].wait_ready()
        lab.wait_connected("source", "destination")
        go(lab, source, destination, 64)
        wait_for("the guest to find what is missing, or to end by it",
                 lambda: destination[0].corruption() or panicked(destination[0]), 120)


def panicked(guest):
    return not guest.is_alive() or any("Kernel panic" in line or "BUG:" in line or "segfault" in line
                                       for line in guest.console.lines())


@live_test([AGENT])
def stock_qemu_guest_that_can_not_move_says_why():
    with Lab() as lab:
        lab.start_memd()
        guest, monitor = start(lab, "fixed", run_options=["--no-migrate"], twin="4M")
        guest.wait_ready()
        status, said = move("check", qmp_path(lab, "fixed"))
        if status != 1 or "not all of the guest's RAM is where memctl run puts it" not in said:
            raise Failure(f"a guest with --no-migrate: {status}: {said}")
        other, monitor = start(lab, "other", twin="4M")
        other.wait_ready()
        moved("check", qmp_path(lab, "other"))
        monitor.run("object-add", **{"qom-type": "memory-backend-ram", "id": "more", "size": 64 << 20})
        status, said = move("check", qmp_path(lab, "other"))
        if status != 1 or "memory was added" not in said:
            raise Failure(f"a guest with another backend: {status}: {said}")
        monitor.run("object-del", id="more")
        monitor.run("stop")
        status, said = move("check", qmp_path(lab, "other"))
        if status != 1 or "does not run" not in said:
            raise Failure(f"a guest that is stopped: {status}: {said}")
