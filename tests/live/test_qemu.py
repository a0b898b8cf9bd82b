# SPDX-License-Identifier: Apache-2.0
"""QEMU does something of its own with the guest's memory while memd shares it."""
import os

from lab import Failure, Lab, PAGE, Skip, machine, wait_for
from lab.qmp import Qmp, qmp_devices
from lab.suite import AGENT, live_test

MIB_PAGES = (1 << 20) // PAGE


def start_with_monitor(lab, name, **options):
    path = os.path.join(lab.directory, f"{name}.qmp")
    guest = lab.start_guest(name, devices=qmp_devices(path), **options)
    guest.wait_ready()
    return guest, Qmp(path)


def wait_migrated(monitor):
    def ended():
        status = monitor.run("query-migrate").get("status")
        if status in ("failed", "cancelled"):
            raise Failure(f"QEMU's migration {status}")
        return status == "completed"
    wait_for("QEMU's migration", ended, 120, 0.2)


@live_test([AGENT])
def qemu_uses_userfaultfd_itself_for_a_background_snapshot():
    """The agent stands down for it, and shares again afterwards."""
    with Lab() as lab:
        lab.start_memd()
        guest, monitor = start_with_monitor(lab, "snap", twin="32M", hot="8M", zero="8M",
                                            run_options=["--no-migrate"])
        lab.wait_shared(24 * MIB_PAGES * 9 // 10)
        image = os.path.join(lab.directory, "image")
        monitor.run("migrate-set-capabilities",
                    capabilities=[{"capability": "background-snapshot", "state": True}])
        monitor.run("migrate", uri=f"exec:cat > {image}")
        wait_migrated(monitor)
        if os.path.getsize(image) < 40 << 20:
            raise Failure(f"the snapshot has only {os.path.getsize(image)} bytes")
        guest.wait_rounds(3)
        guest.report()
        wait_for("sharing to return", lambda: lab.guest_status("snap")["state"] == "active", 60)
        lab.wait_shared(24 * MIB_PAGES * 9 // 10)
        guest.report()


def mergeable_bytes(pid):
    """Memory that the kernel's ksmd may look at ('mg' among a mapping's flags)."""
    total = size = 0
    with open(f"/proc/{pid}/smaps") as file:
        for line in file:
            if line.startswith("Size:"):
                size = int(line.split()[1]) * 1024
            elif line.startswith("VmFlags:") and "mg" in line.split():
                total += size
    return total


@live_test([AGENT])
def guest_memory_is_withheld_from_ksmd():
    """Both would fight for the same pages. QEMU offers its RAM to ksmd in two places."""
    with Lab() as lab:
        lab.start_memd()
        for name, options in (("plain", ["--no-migrate"]), ("file", [])):
            guest = lab.start_guest(name, memory="128M", twin="8M", run_options=options)
            guest.wait_ready()
            if mergeable_bytes(guest.pid) > 4 << 20:  # firmware and the like may be
                raise Failure(f"{name}: ksmd may merge {mergeable_bytes(guest.pid)} bytes")


@live_test([AGENT])
def qemu_writes_a_snapshot_of_shared_memory():
    """A plain migration to a file reads every page through the shares; restored, all is right.
    The guest is stopped for it: one that runs panics in one of seven restored QEMU 7.2 with TCG,
    with memd and without."""
    with Lab() as lab:
        lab.start_memd()
        guest, monitor = start_with_monitor(lab, "source", memory="160M", twin="32M", hot="4M",
                                            run_options=["--no-migrate"])
        lab.wait_shared(24 * MIB_PAGES * 9 // 10)
        image = os.path.join(lab.directory, "image")
        monitor.run("stop")
        monitor.run("migrate", uri=f"exec:cat > {image}.part && mv {image}.part {image}")
        wait_migrated(monitor)
        guest.kill()
        # QEMU is done when the last byte is in the pipe, not when it is in the file.
        wait_for("the image to be written", lambda: os.path.exists(image), 60)
        path = os.path.join(lab.directory, "restored.qmp")
        restored = lab.start_guest("restored", memory="160M", plain=True, twin="32M", hot="4M",
                                   devices=[*qmp_devices(path), "-incoming", f"exec:cat {image}"])
        monitor = Qmp(path)
        wait_for("the image to be read", lambda: monitor.run("query-status")["status"] == "paused", 60)
        monitor.run("cont")
        restored.wait_rounds(3)
        restored.report()


@live_test([AGENT])
def stopped_and_continued_guest_keeps_its_memory():
    with Lab() as lab:
        lab.start_memd()
        guest, monitor = start_with_monitor(lab, "paused", memory="128M", twin="16M", churn="8M")
        monitor.run("stop")
        lab.wait_shared(12 * MIB_PAGES * 9 // 10)
        monitor.run("cont")
        guest.wait_rounds(10)
        guest.report()


@live_test([AGENT])
def dump_of_a_shared_guest_holds_its_true_pages():
    """dump-guest-memory reads all RAM from inside QEMU; two dumps of a stopped guest, one before
    and one after sharing, are the same."""
    with Lab() as lab:
        lab.start_memd({"sharing": {"revisit_s": 600}})
        guest, monitor = start_with_monitor(lab, "dumped", memory="128M", twin="24M", zero="8M")
        monitor.run("stop")
        dumps = [os.path.join(lab.directory, name) for name in ("before", "after")]
        monitor.run("dump-guest-memory", paging=False, protocol=f"file:{dumps[0]}")
        lab.reload_memd({"sharing": {"revisit_s": 1}}, {})
        lab.wait_shared(18 * MIB_PAGES * 9 // 10)
        monitor.run("dump-guest-memory", paging=False, protocol=f"file:{dumps[1]}")
        with open(dumps[0], "rb") as one, open(dumps[1], "rb") as other:
            if one.read() != other.read():
                raise Failure("the dumps differ")
        monitor.run("cont")
        guest.report()
