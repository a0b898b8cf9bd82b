# SPDX-License-Identifier: Apache-2.0
"""The kernel's own page merging, the peer of the sharing figures. Whatever is set here is put back:
by close(), and should this process be killed, by a guardian that sees its pipe end.

Run as a program it is that guardian: it waits for the end of its standard input and puts back the
settings that its argument holds, unless it reads `done` first."""
import json
import os
import signal
import subprocess
import sys
import time

SYSFS = "/sys/kernel/mm/ksm"
# In the order in which they are put back: run last.
SETTINGS = ("advisor_mode", "smart_scan", "use_zero_pages", "sleep_millisecs", "pages_to_scan", "run")
# As a kernel comes; advisor_mode since 6.8, smart_scan since 6.7, use_zero_pages since 4.12.
AS_SHIPPED = {"advisor_mode": "none", "smart_scan": "1", "use_zero_pages": "0",
              "sleep_millisecs": "20", "pages_to_scan": "100"}
FULL_SPEED = {"sleep_millisecs": "1", "pages_to_scan": "20000"}
# sizeof(struct ksm_rmap_item) and (struct ksm_stable_node), mm/ksm.c; see slabinfo.
RMAP_ITEM_BYTES = STABLE_NODE_BYTES = 64


def read(name):
    with open(f"{SYSFS}/{name}") as file:
        text = file.read().strip()
    return text.split("[")[1].split("]")[0] if "[" in text else text


def number(name):
    try:
        return int(read(name))
    except FileNotFoundError:
        return 0  # younger than this kernel


def write(name, text):
    if os.path.exists(f"{SYSFS}/{name}"):
        with open(f"{SYSFS}/{name}", "w") as file:
            file.write(text)


def users():
    """The processes with merged pages."""
    found = []
    for pid in (int(word) for word in os.listdir("/proc") if word.isdigit()):
        try:
            with open(f"/proc/{pid}/ksm_merging_pages") as file:
                found += [pid] if int(file.read() or 0) else []  # a kernel thread says nothing
        except OSError:
            pass  # it ended meanwhile
    return found


def put_back(found):
    if found["run"] != "1":
        write("run", "2")  # nothing of ours stays merged
    for name in SETTINGS:
        if name in found:
            write(name, found[name])


class Ksmd:
    """Raises OSError where kernel KSM can't be steered."""

    def __init__(self):
        self._found = {name: read(name) for name in SETTINGS if os.path.exists(f"{SYSFS}/{name}")}
        if others := users():
            raise OSError(f"kernel KSM is in use by {others}: its figures would not be ours")
        self._guardian = subprocess.Popen(
            [sys.executable, os.path.realpath(__file__), json.dumps(self._found)],
            stdin=subprocess.PIPE, start_new_session=True)
        self.stop()  # pages_shared still counts pages of processes that ended while ksmd did not run

    def close(self):
        put_back(self._found)
        self._guardian.communicate(b"done")

    @staticmethod
    def set(values, **more):
        for name, text in {**values, **more}.items():
            write(name, text)

    def start(self, values):
        self.set(values, run="1")

    def stop(self):
        """Stops ksmd, and lets go of what it merged and kept."""
        self.set({}, run="2")
        self.set(AS_SHIPPED, run="0")

    @staticmethod
    def pages_of_a_pass(passes):
        """How many pages a pass looks at, of the next few. With smart_scan they differ: a page that
        was found unshareable is left out of up to eight."""
        Ksmd.wait_pass()
        before = number("pages_scanned")
        for _ in range(passes):
            Ksmd.wait_pass()
        return (number("pages_scanned") - before) / passes

    @staticmethod
    def wait_pass(limit_s=60):
        """Until the running pass ends; how long that took."""
        start, passes = time.monotonic(), number("full_scans")
        while number("full_scans") == passes and time.monotonic() - start < limit_s:
            time.sleep(0.005)
        return time.monotonic() - start

    @staticmethod
    def metadata_bytes(pids):
        """What the kernel keeps about these processes' pages."""
        items = 0
        for pid in pids:
            with open(f"/proc/{pid}/ksm_stat") as file:
                items += int(next(line.split()[1] for line in file if "ksm_rmap_items" in line))
        return items * RMAP_ITEM_BYTES + number("pages_shared") * STABLE_NODE_BYTES


def guard():
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    if sys.stdin.buffer.read() != b"done":
        put_back(json.loads(sys.argv[1]))


if __name__ == "__main__":
    guard()
