# SPDX-License-Identifier: Apache-2.0
"""The race test: merges and breaks against every kind of writer in one address space (race.c)."""
import os
import re
import subprocess
import tempfile

from lab import Failure, Skip, machine
from lab.suite import FULL, live_test

MERGES = 10_000_000 if FULL else 200_000


def race(*options):
    """(exit status, what it said). Direct I/O goes to the checkout's file system."""
    with tempfile.NamedTemporaryFile(dir=machine.ROOT, prefix=".race.") as file:
        done = subprocess.run([machine.program("race"), "--file", file.name, *options],
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        open(file.name, "a").close()  # race has removed it; NamedTemporaryFile wants to as well
    if done.returncode == 77:
        raise Skip(done.stdout.strip())
    return done.returncode, done.stdout.strip()


def huge_pages_are_to_be_had():
    with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
        return "[never]" not in file.read()


@live_test([], limit_minutes=4, full_minutes=60)
def writers_lose_nothing_to_merges():
    status, said = race("--merges", str(MERGES))
    if os.environ.get("MEMD_FULL"):
        print(said, flush=True)
    if status != 0:
        raise Failure(said)
    if huge_pages_are_to_be_had() and not int(re.search(r"(\d+) huge", said)[1]):
        raise Failure(f"no huge page was frozen whole: {said}")


@live_test([], limit_minutes=4)
def without_the_freeze_a_write_is_lost():
    status, said = race("--merges", str(MERGES), "--no-freeze")
    if status == 0:
        raise Failure(f"the race test can't fail: {said}")


@live_test([], limit_minutes=4)
def without_the_freeze_a_write_to_a_huge_page_is_lost():
    if not huge_pages_are_to_be_had():
        raise Skip("transparent huge pages are off")
    status, said = race("--huge", "--merges", str(MERGES), "--no-freeze")
    if status == 0:
        raise Failure(f"the race test can't fail: {said}")
