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

from kit import memory, ram
from kit.figure import Row, as_ratio, in_turn, median, say, text
from kit.fleet import LOAD_DUTY, SAMPLE_S, UNDER_LOAD, regions
from kit.procs import CpuSum, thread_system_time

FIGURES = ("rest_sharing", "cpu_to_95", "cpu_at_rest", "memory_per_page")
AT_REST = {"rest_sharing", "cpu_at_rest", "memory_per_page"}

APART_S = 30      # between two dumps
WANTED = 0.95     # of what can be shared
LIMIT_S = 60      # for reaching that: ksmd, with smart_scan, doesn't always
PASS_S = 10
REST_S = 60


def measure(machine, options, names, run):
    lives = {}
    for engine in in_turn(run):
        say(f"{options.guests} guests of {options.memory} boot, for {engine}")
        with machine.fleet(engine) as fleet:
            lives[engine] = live(fleet, options, names)
    found = {name: {engine: life[name] for engine, life in lives.items()} for name in names}
    if "memory_per_page" in found:
        found["memory_per_page"]["per_page"] = memory.per_page(
            lives["memd"]["memory_per_page"], lives["ksmd"]["memory_per_page"], lives["ksmd"]["before"])
    return found


def live(fleet, options, names):
    fleet.boot(options.guests, options.memory, regions(options.memory, UNDER_LOAD, duty=LOAD_DUTY))
    fleet.wait_filled()
    found = {"before": memory.medians(fleet.guests)}
    if "cpu_to_95" in names:
        found["cpu_to_95"] = to_95(fleet)
    else:
        fleet.start()
    if AT_REST & set(names):
        found.update(at_rest(fleet))
    fleet.lab.report_all()
    return found


# ---- dumps ----

def two_dumps(fleet, meanwhile):
    """Two dumps of each guest, APART_S apart (more if meanwhile(seconds), which is called between
    them and told how long there is, takes longer)."""
    start = time.monotonic()
    first = ram.dump_all(fleet.guests, fleet.lab.directory, "first")
    meanwhile(max(10.0, start + APART_S - time.monotonic()))
    time.sleep(max(0.0, start + APART_S - time.monotonic()))
    return first, ram.dump_all(fleet.guests, fleet.lab.directory, "second")


# ---- CPU to 95 % ----

def system_time(fleet):
    """The guests' own: their VMMs' threads in the kernel, the agent's threads left out."""
    return CpuSum(fleet.own_threads, thread_system_time)


def to_95(fleet):
    control = {}

    def control_window(seconds):
        start, used = time.monotonic(), system_time(fleet)
        time.sleep(seconds)
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
    cpu = fleet.start()
    samples = []
    while True:
        saved, seconds = fleet.saved_pages(), time.monotonic() - start
        parts = {part: used.seconds() for part, used in cpu.items()}
        parts["faults_s"] = max(0.0, own.seconds() - control_rate * seconds)
        samples.append({"seconds": seconds, "saved_pages": saved, **parts})
        if saved >= wanted or seconds > LIMIT_S:
            break
        time.sleep(SAMPLE_S)
    return {"reached": saved >= wanted, "seconds": seconds, "saved_pages": saved, **parts,
            "cpu_s": sum(parts.values()), "samples": samples}


# ---- at rest ----

def at_rest(fleet):
    fleet.pause_guests()
    settled_s = fleet.wait_settled()
    fleet.look_at_blocks()
    say(f"the guests write no more; sharing settled in {settled_s:.0f} s; two dumps")
    first, second = two_dumps(fleet, lambda _: fleet.slow_down(PASS_S))
    saved = fleet.saved_pages()
    say(f"{REST_S} s at rest")
    fleet.wait_pass()
    cpu = fleet.engine_cpu()
    rest_s, pass_s = fleet.rest(REST_S)
    parts = {part: used.seconds() for part, used in cpu.items()}
    used = memory.memd_memory if fleet.name == "memd" else memory.ksmd_memory
    memory_used = used(fleet)
    can = ram.shareable(first, second)
    part = saved / can["shareable_pages"]
    say(f"{100 * part:.2f} % of what can be saved is; {100 * sum(parts.values()) / rest_s:.3f} % of a core")
    return {"rest_sharing": {"saved_pages": saved, "part": part, **can},
            "cpu_at_rest": {"rest_s": rest_s, "pass_s": pass_s, **parts,
                            # of one core, were a pass exactly PASS_S long
                            "cpu_part": sum(parts.values()) / rest_s * pass_s / PASS_S},
            "memory_per_page": memory_used}


# ---- the table ----

def rows(name, runs):
    return {"rest_sharing": sharing_rows, "cpu_to_95": race_rows, "cpu_at_rest": rest_rows,
            "memory_per_page": memory_rows}[name](runs)


def sharing_rows(runs):
    memd, ksmd = (median(runs, engine, "part") for engine in ("memd", "ksmd"))
    cells = [text(value and 100 * value, "{:.1f} %") for value in (memd, ksmd, memd)]
    return [Row("sharing found at rest, of what `analyze` counts over pages that were equal in two "
                "dumps 30 s apart", *cells, "95 %", "99 %")]


def missed(runs, engine):
    return sum(not run[engine]["reached"] for run in runs)


def race_words(runs, engine):
    """The median; a run that did not get there counts with what it used until the limit."""
    words = text(median(runs, engine, "cpu_s"), "{:.2f} s")
    often = missed(runs, engine)
    return words + (f" (not reached after {LIMIT_S} s in {often} of {len(runs)})" if often else "")


def race_figure(runs):
    if missed(runs, "memd"):
        return "not reached"
    ratio = as_ratio(*(median(runs, engine, "cpu_s") for engine in ("memd", "ksmd")))
    return ratio + (" or more" if missed(runs, "ksmd") else "")


def race_rows(runs):
    return [Row("CPU to 95 % of that, guests under load (engine and the guests' extra fault time)",
                race_words(runs, "memd"), race_words(runs, "ksmd"), race_figure(runs), "1 : 2", "1 : 4"),
            Row("- seconds until then", *(text(median(runs, engine, "seconds"), "{:.1f} s")
                                          for engine in ("memd", "ksmd")))]


def rest_rows(runs):
    cpu = [median(runs, engine, "cpu_part") for engine in ("memd", "ksmd")]
    return [Row("CPU at rest, a pass every 10 s, of one core",
                *(text(value and 100 * value, "{:.3f} %") for value in cpu), as_ratio(*cpu),
                "1 : 20", "1 : 100")]


def memory_rows(runs):
    def cells(part):
        return [text(median(runs, "per_page", f"{engine}_{part}"), "{:.1f} bytes")
                for engine in ("memd", "ksmd")]
    return [Row("user memory for each watched page, store aside (ksmd: kernel memory)", *cells("bytes"),
                cells("bytes")[0], "24 bytes", "16 bytes"),
            Row("- of that fixed, not growing with a guest", cells("fixed_bytes")[0]),
            Row("- VMAs, of 200 bytes", *cells("vma_bytes")),
            Row("- page tables", *cells("page_table_bytes"))]
