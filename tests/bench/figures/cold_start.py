# SPDX-License-Identifier: Apache-2.0
"""cold_start: what it costs that a guest's pages are hashed, sent and looked up for the first time.

A VMM that does nothing else (cold_vmm) registers 512 MiB, no page of which anybody else has: random
pages, or pages that differ in their last 8 bytes only. Counted is the CPU time of memd and of the
agent from the registration until every page was hashed and memd has nothing more to do, against what
XXH3 alone took over the same pages in the same order, in the same process before."""
import subprocess
import time

from lab import Failure, machine, wait_for

from kit import procs
from kit.figure import Row, median, say, text

FIGURES = ("cold_start",)
MIB = 512
PAGES = MIB * 256
QUIET_S = 1.0
CONTENTS = ("random", "last_8")


def measure(bench, _options, _names, _run):
    found = {content: cold(bench, content) for content in CONTENTS}
    for content, one in found.items():
        say(f"{content}: XXH3 alone {one['alone_s']:.3f} s, agent {one['agent_s']:.3f} s, memd {one['daemon_s']:.3f} s")
    found["last_8_cost"] = found["last_8"]["all_s"] / found["random"]["all_s"]
    return {"cold_start": found}


def cold(bench, content):
    with bench.lab() as lab:
        lab.start_memd({"sharing": {"revisit_s": 1, "cpu_percent": 100}}, {"bench": [0]})
        vmm = lab.spawn([machine.program("memctl"), "--socket", lab.socket, "run", "--name", "cold", "--domain",
                         "bench", "--max", f"{MIB}M", "--", machine.program("cold_vmm"), str(MIB), content],
                        "cold.log", stdin=subprocess.PIPE)
        said = wait_for("XXH3", lambda: words(lab, "alone "), 60)
        memd = lab.memd.pid
        daemon = procs.CpuSum(lambda: [(memd, tid) for tid in set(procs.threads(memd)) - set(procs.status_readers(memd))])
        agent = procs.CpuSum(lambda: [(vmm.pid, tid) for tid in procs.agent_threads(vmm.pid)], from_zero=True)
        vmm.stdin.write(b"go\n")
        vmm.stdin.flush()
        wait_for("the registration", lambda: words(lab, "registered"), 60)
        wait_for("every page to be hashed", lambda: hashed(lab) >= PAGES, 120, 0.25)
        agent_s, daemon_s = wait_quiet(agent, daemon)
        status = lab.guest_status("cold")
        if status["places"]["shared"] > PAGES // 1000:  # hints of 32 bits meet by chance, and are found out
            raise Failure(f"pages are shared that nobody has twice: {status}")
        return {"alone_s": float(said.split()[1]), "agent_s": agent_s, "daemon_s": daemon_s,
                "all_s": agent_s + daemon_s, "of_xxh3": 100 * float(said.split()[1]) / (agent_s + daemon_s)}


def words(lab, beginning):
    return next((line for line in lab.log("cold.log").splitlines() if line.startswith(beginning)), None)


def hashed(lab):
    return lab.guest_status("cold")["counters"]["hashed"]


def wait_quiet(agent, daemon):
    """Until both have used next to nothing for a second; the CPU time before it."""
    before = (agent.seconds(), daemon.seconds())
    while True:
        time.sleep(QUIET_S)
        now = (agent.seconds(), daemon.seconds())
        if sum(now) - sum(before) < 0.01 * QUIET_S:
            return before
        before = now


WHAT = {"random": "random pages", "last_8": "pages that differ in their last 8 bytes"}


def rows(_name, runs):
    yield from (Row(f"cold start, {MIB} MiB of {WHAT[content]}: hashed, sent and looked up, rate against XXH3 alone "
                    f"({text(median(runs, content, 'alone_s'), '{:.3f} s')}), in CPU time",
                    text(median(runs, content, "all_s"), "{:.3f} s"), "",
                    text(median(runs, content, "of_xxh3"), "{:.0f} %"), "50 %", "80 %",
                    f"agent {text(median(runs, content, 'agent_s'), '{:.3f} s')}, "
                    f"memd {text(median(runs, content, 'daemon_s'), '{:.3f} s')}") for content in CONTENTS)
    yield Row(f"cold start, {WHAT['last_8']}: cost against random pages", "", "",
              text(median(runs, "last_8_cost"), "{:.2f}x"), "1.5x", "1.1x")
