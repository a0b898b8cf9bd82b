# SPDX-License-Identifier: Apache-2.0
"""What a figure is, and its rows of the table.

A module of figures measures some names at once, because they come from the same guests:
measure(machine, options, names, run) gives {name: {...}} with every number of that run, of which
rows() makes rows for the table from the medians of all runs. `run` counts from 0: even runs take
memd first, odd ones ksmd."""
import itertools
import statistics
import sys
import time


class Row:
    """One line of the table; all but `what` are texts, made of medians. `cpu` is for figures of wall
    time that more than one thread makes."""

    def __init__(self, what, memd="", ksmd="", figure="", least="", aim="", cpu=""):
        self.cells = [what, memd, ksmd, figure, least, aim, cpu]


HEAD = Row("", "memd", "ksmd", "figure", "at least", "aim", "CPU time")


def median(runs, *path):
    """The median of one number over the runs: of those that have it; None when none has."""
    found = []
    for value in runs:
        for step in path:
            value = value.get(step) if isinstance(value, dict) else None
        if value is not None:
            found.append(value)
    return statistics.median(found) if found else None


def text(value, form="{:.1f}"):
    return "-" if value is None else form.format(value)


def as_ratio(memd, ksmd):
    """How many times ksmd's price is memd's: '1 : 4.2'"""
    return "-" if not memd or ksmd is None else f"1 : {ksmd / memd:.3g}"


def in_turn(run):
    return ("memd", "ksmd") if run % 2 == 0 else ("ksmd", "memd")


_started = time.monotonic()


def say(words):
    """Progress, on standard error."""
    print(f"[{time.monotonic() - _started:5.0f} s] {words}", file=sys.stderr, flush=True)


def markdown(rows):
    """A column that no row fills is left out."""
    used = [i == 0 or any(row.cells[i] for row in rows) for i in range(len(HEAD.cells))]
    lines = [HEAD.cells, ["---"] * len(HEAD.cells)] + [row.cells for row in rows]
    return "\n".join("| " + " | ".join(itertools.compress(cells, used)) + " |" for cells in lines)
