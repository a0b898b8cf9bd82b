# SPDX-License-Identifier: Apache-2.0
"""analyze: how fast `memctl analyze` counts a dump, against XXH3 alone over the same file.

Both are one thread, over a file in the page cache, timed as whole processes. Compression is measured
apart: LZ4 alone takes several times as long as everything else, and its bytes are not XXH3's matter.
Three dumps: random pages; pages that differ in their last 8 bytes only; and a guest's, a quarter each
of zeros, of duplicates near and far, and the rest unique."""
import os
import random
import struct
import subprocess
import tempfile
import time

from lab import Failure, machine

from kit.figure import Row, median, say, text

FIGURES = ("analyze",)
PAGE, PAGES = 4096, 262144  # 1 GiB
TURNS = 3


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
        with open(os.path.join(directory, name), "rb") as file:
            while file.read(1 << 22):
                pass


def seconds(command):
    """Of the clock, and of the processor."""
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          text=True)
    took, after = time.perf_counter() - start, os.times()
    if done.returncode:
        raise Failure(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()}")
    return took, after[2] + after[3] - before[2] - before[3]


def fastest(commands):
    """The fastest of some turns of each command, which take turns: a turn's noise is not what is compared."""
    turns = [[seconds(command) for command in commands] for _ in range(TURNS)]
    return [tuple(min(turn[i][which] for turn in turns) for which in (0, 1)) for i in range(len(commands))]


_dumps = None  # made once for all runs


def measure(_machine, _options, _names, _run):
    global _dumps
    if _dumps is None:
        _dumps = tempfile.TemporaryDirectory(prefix="memd-bench.", dir="/var/tmp")
        make_dumps(_dumps.name)
    analyze, found = [machine.program("memctl"), "analyze", "--json"], {}
    for name in DUMPS:
        path = os.path.join(_dumps.name, name)
        alone, counting, whole = fastest([[machine.program("xxh3_alone"), path],
                                          [*analyze, "--no-compression", path], [*analyze, path]])
        found[name] = {"xxh3_s": alone[0], "counting_s": counting[0], "whole_s": whole[0],
                       "of_xxh3": 100 * alone[0] / counting[0], "xxh3_cpu_s": alone[1],
                       "counting_cpu_s": counting[1], "of_xxh3_cpu": 100 * alone[1] / counting[1]}
        say(f"{name}: counting at {found[name]['of_xxh3']:.0f} % of XXH3 alone "
            f"({counting[0]:.3f} s against {alone[0]:.3f} s for 1 GiB; by processor time "
            f"{found[name]['of_xxh3_cpu']:.0f} %)")
    found["last_8_cost"] = found["last_8"]["counting_s"] / found["random"]["counting_s"]
    return {"analyze": found}


def rows(_name, runs):
    def line(name, what):
        counting, alone, whole = (text(median(runs, name, part), "{:.3f} s") for part in ("counting_s", "xxh3_s", "whole_s"))
        share = text(median(runs, name, "of_xxh3"), "{:.0f} %")
        return Row(f"`analyze --no-compression` against XXH3 alone, 1 GiB of {what} (XXH3 {alone}; with LZ4 {whole})",
                   counting, "", share, "50 %", "80 %")
    return [line("random", "random pages"), line("guest", "a guest's mix"),
            line("last_8", "pages that differ in their last 8 bytes"),
            Row("`analyze`, pages that differ in their last 8 bytes only, cost against random ones", "", "",
                text(median(runs, "last_8_cost"), "{:.2f}x"), "1.5x", "1.1x")]
