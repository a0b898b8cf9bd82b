# SPDX-License-Identifier: Apache-2.0
"""analyze: how fast `memctl analyze` counts a dump, against XXH3 alone over the same file.

All are whole processes over a file in the page cache, once in each run and one after the other; the
figure is wall time. XXH3 alone is one thread. So is `analyze --no-compression`; what LZ4 would save is
measured by threads of their own, so that CPU time is said besides.
Three dumps: random pages, which LZ4 can't compress; pages that differ in their last 8 bytes only, all
of which have to be told apart; and a guest's, a quarter each of zeros, of duplicates near and far, and
the rest unique."""
import os
import random
import resource
import struct
import subprocess
import tempfile
import time

from lab import Failure, machine

from kit.figure import Row, median, say, text

FIGURES = ("analyze",)
PAGE, PAGES = 4096, 262144  # 1 GiB


def near(_chance):
    head = b"memd" * 1022
    for page in range(PAGES):
        yield head + struct.pack("<Q", page)


def unique(chance):
    for _ in range(PAGES):
        yield chance.randbytes(PAGE)


def guest(chance):
    common = [chance.randbytes(PAGE) for _ in range(PAGES // 8)]
    for page in range(PAGES):
        kind = page // 64 % 4  # runs of 64, as files in a page cache are
        if kind == 0:
            yield bytes(PAGE)
        elif kind == 1:
            yield common[(page // 256 * 64 + page % 64) % len(common)]
        else:
            yield chance.randbytes(PAGE)


DUMPS = {"random": unique, "last_8": near, "guest": guest}


def make_dumps(directory):
    for name, pages in DUMPS.items():
        with open(os.path.join(directory, name), "wb", buffering=1 << 20) as file:
            for page in pages(random.Random(1)):
                file.write(page)
        os.sync()  # so that nothing is written back while others are timed


def warm(path):
    """Into the page cache, should it not be there."""
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 22):
            pass


def cpu_of_children():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def seconds(command):
    """Of the clock, and of all of its CPUs."""
    before, start = cpu_of_children(), time.perf_counter()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          text=True)
    took = time.perf_counter() - start
    if done.returncode:
        raise Failure(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()}")
    return {"s": took, "cpu_s": cpu_of_children() - before}


def compare(path, run):
    """XXH3 first in even runs, last in odd ones."""
    analyze = [machine.program("memctl"), "analyze", "--json"]
    commands = {"xxh3": [machine.program("xxh3_alone"), path], "whole": [*analyze, path],
                "counting": [*analyze, "--no-compression", path]}
    warm(path)
    found = {name: seconds(commands[name]) for name in (list(commands) if run % 2 == 0 else reversed(commands))}
    for name in ("whole", "counting"):
        for kind in ("s", "cpu_s"):
            found[name]["of_xxh3_" + kind] = 100 * found["xxh3"][kind] / found[name][kind]
    return found


_dumps = None  # made once for all runs


def measure(_machine, _options, _names, run):
    global _dumps
    if _dumps is None:
        _dumps = tempfile.TemporaryDirectory(prefix="memd-bench.", dir="/var/tmp")
        make_dumps(_dumps.name)
    found = {name: compare(os.path.join(_dumps.name, name), run) for name in DUMPS}
    for name, of in found.items():
        say(f"{name}: " + ", ".join(f"{what} {of[what]['s']:.3f} s ({of[what]['cpu_s']:.3f} s of CPU)" for what in of))
    found["last_8_cost"] = {what: found["last_8"][what]["s"] / found["random"][what]["s"] for what in ("whole", "counting")}
    return {"analyze": found}


WHAT = {"random": "random pages", "last_8": "pages that differ in their last 8 bytes", "guest": "a guest's mix"}
COMMANDS = {"whole": "analyze", "counting": "analyze --no-compression"}


def rate(runs, name, which):
    alone = [text(median(runs, name, "xxh3", kind), "{:.3f} s") for kind in ("s", "cpu_s")]
    own = [text(median(runs, name, which, kind), "{:.3f} s") for kind in ("s", "cpu_s")]
    share = [text(median(runs, name, which, "of_xxh3_" + kind), "{:.0f} %") for kind in ("s", "cpu_s")]
    return Row(f"`{COMMANDS[which]}`, 1 GiB of {WHAT[name]}: rate against XXH3 alone ({alone[0]}, CPU {alone[1]})",
               own[0], "", share[0], "50 %", "80 %", f"{own[1]}, {share[1]}")


def cost(runs, which):
    return Row(f"`{COMMANDS[which]}`, {WHAT['last_8']}: time against random pages", "", "",
               text(median(runs, "last_8_cost", which), "{:.2f}x"), "1.5x", "1.1x")


def rows(_name, runs):
    return [rate(runs, name, which) for which in COMMANDS for name in DUMPS] + [cost(runs, which) for which in COMMANDS]
