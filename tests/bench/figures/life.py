# SPDX-License-Identifier: Apache-2.0
"""Four figures out of one life of a fleet, once under memd and once under ksmd:

1. Under load, without an engine. Two dumps 30 s apart say what can be shared; in between is the
   control window for the guests' own system time.
2. The engine starts, at full speed                                              -> cpu_to_95
3. The guests stop writing. Sharing settles, the engine slows down to one pass in 10 s, two more
   dumps 30 s apart                                                              -> rest_sharing
4. 60 s in which nobody asks the engine anything                                 -> cpu_at_rest
5. What is used besides guest RAM                                                -> memory_per_page
"""
import time

from kit import ram
from kit.figure import Row, as_ratio, in_turn, median, say, text
from kit.fleet import KERNEL_WORDS, LOAD_DUTY, SAMPLE_S, UNDER_LOAD, regions
from kit.memory import baseline, ksmd_memory, memd_memory
from kit.procs import CpuSum, thread_system_time

FIGURES = ("rest_sharing", "cpu_to_95", "cpu_at_rest", "memory_per_page")
AT_REST = {"rest_sharing", "cpu_at_rest", "memory_per_page"}

APART_S = 30      # between two dumps
WANTED = 0.95     # of what can be shared
LIMIT_S = 120     # for reaching that; as ksmd, which smart_scan makes slow now and then, has it
PASS_S = 10
REST_S = 60


def measure(machine, options, names, run):
    lives = {}
    for engine in in_turn(run):
        say(f"{options.guests} guests of {options.memory} under {engine} boot")
        with machine.fleet(engine) as fleet:
            lives[engine] = live(fleet, options, names)
    return {name: {engine: life[name] for engine, life in lives.items()} for name in names}


def live(fleet, options, names):
    fleet.boot(options.guests, options.memory, regions(options.memory, UNDER_LOAD, duty=LOAD_DUTY))
    fleet.wait_filled()
    found = {"memory_per_page": {"before": baseline(fleet)}}
    if "cpu_to_95" in names:
        found["cpu_to_95"] = to_95(fleet)
    else:
        fleet.start()
    if AT_REST & set(names):
        at_rest(fleet, names, found)
    fleet.lab.report_all()
    return found


# ---- dumps ----

def two_dumps(fleet, meanwhile=lambda: None):
    """What can be shared by pages that did not change in APART_S. meanwhile() is called between the
    dumps, and has to be over before the second."""
    start = time.monotonic()
    first = ram.dump_all(fleet.guests, fleet.lab.directory, "first")
    meanwhile()
    time.sleep(max(0.0, start + APART_S - time.monotonic()))
    return first, ram.dump_all(fleet.guests, fleet.lab.directory, "second")


# ---- CPU to 95 % ----

def system_time(fleet):
    """The guests' own: their VMMs' threads in the kernel, the agent's threads left out."""
    return CpuSum(fleet.own_threads, thread_system_time)


def to_95(fleet):
    control = {}

    def control_window():
        start, used = time.monotonic(), system_time(fleet)
        time.sleep(APART_S - 5)
        control["rate"] = used.seconds() / (time.monotonic() - start)

    say("under load without sharing: two dumps, and the control window")
    can = ram.shareable(*two_dumps(fleet, control_window))
    wanted = WANTED * can["shareable_pages"]
    say(f"sharing begins; {can['shareable_pages']} pages can be saved")
    found = race(fleet, wanted, control["rate"])
    say(f"{found['saved_pages']} pages saved after {found['seconds']:.1f} s, {found['cpu_s']:.2f} s of CPU")
    return {**found, "wanted_pages": wanted, "control_per_s": control["rate"], "shareable": can}


def race(fleet, wanted, control_rate):
    """Starts the engine and watches it until enough is saved or the time is over. The CPU is that
    of the first look that finds enough: never too little."""
    start, own = time.monotonic(), system_time(fleet)
    samples = []
    if fleet.name == "memd":
        agents = fleet.agents_cpu()
    fleet.start()
    cpu = fleet.engine_cpu() if fleet.name == "ksmd" else {**fleet.daemon_cpu(), **agents}
    while True:
        saved, seconds = fleet.saved_pages(), time.monotonic() - start
        parts = {part: used.seconds() for part, used in cpu.items()}
        parts["faults_s"] = own.seconds() - control_rate * seconds
        samples.append({"seconds": seconds, "saved_pages": saved, **parts})
        if saved >= wanted or seconds > LIMIT_S:
            break
        time.sleep(SAMPLE_S)
    return {"reached": saved >= wanted, "seconds": seconds, "saved_pages": saved, **parts,
            "cpu_s": sum(parts.values()), "samples": samples}
