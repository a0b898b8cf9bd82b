# SPDX-License-Identifier: Apache-2.0
"""The second engine: memd steers the kernel's own KSM."""
import os

from lab import Failure, Lab, PAGE, wait_for
from lab.suite import KERNEL_ENGINE, live_test

KSM = "/sys/kernel/mm/ksm"
MIB_PAGES = (1 << 20) // PAGE


def ksm_settings():
    """What can be set there; the counters beside it are read-only."""
    settings = {}
    for name in sorted(os.listdir(KSM)):
        path = os.path.join(KSM, name)
        if os.stat(path).st_mode & 0o200:
            with open(path) as file:
                settings[name] = file.read().strip()
    return settings


@live_test([KERNEL_ENGINE])
def kernel_engine_shares_and_restores_what_it_found():
    found = ksm_settings()
    with Lab() as lab:
        try:
            lab.start_memd({"sharing": {"engine": "kernel"}})
            guests = [lab.start_guest(name, common="48M", zero="8M", churn="4M", hot="4M")
                      for name in ("left", "right")]
            for guest in guests:
                guest.wait_ready()
            lab.wait_shared(48 * MIB_PAGES * 9 // 10, 180)
            engines = {guest["engine"] for guest in lab.status()["guests"]}
            if engines != {"kernel"}:
                raise Failure(f"engines {engines}")
            lab.report_all()
            lab.memd.terminate()
            wait_for("memd to end", lambda: lab.memd.poll() is not None, 60)
            if ksm_settings() != found:
                raise Failure(f"found {found}, left {ksm_settings()}")
            guests[0].wait_rounds(3)
            lab.report_all()
        finally:
            restore(found)


def restore(settings):
    """Not memd's work: a failed test leaves the machine as it was."""
    for name, value in settings.items():
        chosen = value[value.index("[") + 1:value.index("]")] if "[" in value else value
        try:
            with open(os.path.join(KSM, name), "w") as file:
                file.write(chosen)
        except OSError:
            pass  # some can't be set while pages are merged
