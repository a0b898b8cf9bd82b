# SPDX-License-Identifier: Apache-2.0
"""What a live test is, and the things that several of them need."""
import functools
import os

from . import machine
from .errors import Skip

TESTS = []
FULL = os.environ.get("MEMD_FULL") == "1"
AGENT, KERNEL_ENGINE, MEMVM = "agent", "kernel_engine", "memvm"


class HungTest(Exception):
    """The limit of a test is over. No measurement: only a hang gets that far."""


class LiveTest:
    def __init__(self, function, limit_minutes, full_minutes):
        self.name = function.__name__
        self.function = function
        self._minutes = full_minutes if FULL and full_minutes else limit_minutes

    def limit_s(self):
        return self._minutes * 60


def live_test(needs=(), limit_minutes=5, full_minutes=None):
    """Marks a function as a test. needs: what of AGENT, KERNEL_ENGINE, MEMVM the machine must have."""
    def mark(function):
        @functools.wraps(function)
        def checked():
            for need in needs:
                _NEEDS[need]()
            function()
        TESTS.append(LiveTest(checked, limit_minutes, full_minutes))
        return checked
    return mark


def needs_agent():
    if machine.agent_obstacle():
        raise Skip(machine.agent_obstacle())
    if not os.path.exists(machine.library()):
        raise Skip(f"no {machine.library()}: the agent was not built")


def needs_kernel_engine():
    if not os.access("/sys/kernel/mm/ksm/run", os.W_OK):
        raise Skip("/sys/kernel/mm/ksm can't be written: no kernel KSM here")


def needs_memvm():
    if machine.memvm_obstacle():
        raise Skip(f"no guest under memvm: {machine.memvm_obstacle()}")


_NEEDS = {AGENT: needs_agent, KERNEL_ENGINE: needs_kernel_engine, MEMVM: needs_memvm}


def short_or_full(short, full):
    return full if FULL else short
