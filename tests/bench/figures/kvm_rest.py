# SPDX-License-Identifier: Apache-2.0
"""kvm_rest: what memd and the agents of a hundred KVM guests at rest use together.

The guests are memvm's bare ones, 16 MiB each in one domain. They have shared what they can and write
nothing any more, but go on verifying; a pass comes every 10 s. Counted are the threads of memd (less
those that read figures for `memctl status`) and of all agents, over 60 s in which nobody is asked
anything."""
import time

from lab import Failure

from kit import procs
from kit.figure import Row, median, say, text

FIGURES = ("kvm_rest",)

GUESTS = 100
REGIONS = {"common": "6M", "zero": "2M", "twin": "2M", "unique": "1M", "text": "1M", "hot": "128K",
           "duty": 1, "every": 60}
COMMON_PAGES = 6 * 256
PASS_S = 10
REST_S = 60
DOMAIN = "bench"


def measure(machine, _options, _names, _run):
    say(f"{GUESTS} guests of memvm boot")
    with machine.lab() as lab:
        lab.start_memd({"sharing": {"revisit_s": PASS_S}}, {DOMAIN: [0]})
        guests = [lab.start_memvm(f"kvm{number}", domain=DOMAIN, **REGIONS) for number in range(1, GUESTS + 1)]
        for guest in guests:
            guest.wait_ready()
        lab.wait_connected(*(guest.name for guest in guests))
        settle(lab, guests)
        found = at_rest(lab, guests)
        lab.report_all()
    say(f"{100 * found['cpu_part']:.3f} % of a core")
    return {"kvm_rest": found}


def settle(lab, guests):
    """They stop writing, and what all have in common is shared. The scanner slows down to its pace
    at rest after some passes without news."""
    for guest, tag in [(guest, guest.ask("pause")) for guest in guests]:
        guest.console.wait(f"{guest.name} to pause", lambda line, tag=tag: line.endswith(f"paused tag={tag}"), 180)
    lab.wait_shared(COMMON_PAGES * (GUESTS - 1) * 9 // 10)
    time.sleep(4 * PASS_S)


def at_rest(lab, guests):
    memd = lab.memd.pid
    agents = procs.CpuSum(lambda: [(guest.pid, tid) for guest in guests for tid in procs.agent_threads(guest.pid)])
    daemon = procs.CpuSum(lambda: [(memd, tid) for tid in set(procs.threads(memd)) - set(procs.status_readers(memd))])
    start = time.monotonic()
    say(f"{REST_S} s at rest")
    time.sleep(REST_S)
    rest_s = time.monotonic() - start
    found = {"rest_s": rest_s, "daemon_s": daemon.seconds(), "agents_s": agents.seconds()}
    if found["agents_s"] == 0:
        raise Failure("the agents have used no CPU at all: they are not at work")
    return {**found, "saved_bytes": lab.sharing()["saved_bytes"],
            "cpu_part": (found["daemon_s"] + found["agents_s"]) / rest_s}


def rows(_name, runs):
    parts = [median(runs, part) for part in ("daemon_s", "agents_s")]
    cpu = text(100 * median(runs, "cpu_part"), "{:.3f} %")
    return [Row(f"{GUESTS} KVM guests at rest, memd ({parts[0]:.2f} s) and all agents ({parts[1]:.2f} s) in "
                f"{REST_S} s, of one core", cpu, "", cpu, "5 %", "1 %")]
