# SPDX-License-Identifier: Apache-2.0
"""freeze_wait: how long a write waits that meets a freeze. See freeze_wait.c."""
import json
import subprocess

from lab import Failure, machine

from kit.figure import Row, median, say, text

FIGURES = ("freeze_wait",)
WAITS = 10000


def measure(_machine, _options, _names, _run):
    done = subprocess.run([machine.program("freeze_wait"), "--waits", str(WAITS)],
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True)
    if done.returncode:
        raise Failure(f"freeze_wait ended with {done.returncode}: {done.stderr.strip()}")
    found = json.loads(done.stdout)
    say(f"writes that met a freeze waited {found['p50_us']} us (p50), {found['p99_us']} us (p99)")
    return {"freeze_wait": found}


def rows(_name, runs):
    p50, p99, most = (text(median(runs, part), "{:.0f} us") for part in ("p50_us", "p99_us", "max_us"))
    return [Row(f"a guest's write that met a freeze, p99 of {WAITS:,} (p50 {p50}, max {most})", p99, "",
                p99, "2 ms", "200 us")]
