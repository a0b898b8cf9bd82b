# SPDX-License-Identifier: Apache-2.0
"""How a test ends when it does not succeed, and how it waits."""
import time


class Failure(Exception):
    """Something is not as it has to be."""


class Skip(Exception):
    """The machine lacks what this needs; the text says what."""


def wait_for(what, condition, seconds=60, every=0.1):
    """Calls condition() until it gives something true, and returns that. The deadline is for what
    hangs, not for what is slow: choose it generously."""
    deadline = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise Failure(f"waited {seconds} s in vain for {what}")
        time.sleep(every)
