# SPDX-License-Identifier: Apache-2.0
"""Guests of a stock QEMU that move between two memds: QEMU carries the state of its devices, memd all of
the memory."""
import os
import signal

from lab import Failure, Lab, wait_for
from lab.network import Wire
from lab.qmp import Qmp, qmp_devices
from lab.suite import AGENT, live_test
from test_migrate import Hosts, check_report

MEMORY = "160M"
RAM_PAGES = 160 << 8
REGIONS = {"twin": "24M", "unique": "16M", "hot": "8M", "zero": "8M", "duty": 40, "every": 1}


class QemuHosts(Hosts):
    """As for memvm, with a QEMU at either end."""

    def start(self, name="moves", **options):
        of_source, of_destination = self.keys()
        self.source.start_memd({"migration": of_source})
        self.destination.start_memd({"migration": {"listen": self.address, **of_destination},
                                     **self.destination.awaits_qemu(name, MEMORY)})
        self.name = name
        self.test_monitor = os.path.join(self.source.directory, f"{name}.test")
        self.guest = self.source.start_guest(name, memory=MEMORY, seed=1, devices=qmp_devices(self.test_monitor),
                                             **{**REGIONS, **options})
        self.guest.wait_ready()
        self.source.wait_connected(name)

    def arrived(self):
        wait_for("the VMM at the source to end", lambda: not self.guest.is_alive(), 60)
        return self.destination.arrived_qemu(self.name)


def two_qemus(test, wire=None):
    """The test with two hosts, with a wire between their networks; when it fails their logs stay."""
    networks = wire.names if wire else (None, None)
    with Lab(network=networks[0]) as source, Lab(network=networks[1]) as destination:
        hosts = QemuHosts(source, destination, wire)
        try:
            test(hosts)
        except BaseException:
            source.failed = destination.failed = True
            raise


def move_and_verify(hosts):
    """The guest, at the destination."""
    hosts.start()
    report, guest = hosts.completes()
    check_report(report)
    if report["pages"] != RAM_PAGES:
        raise Failure(f"memd has moved more than the RAM that QEMU leaves to it: {report}")
    guest.wait_rounds(2)
    guest.report()
    return guest


@live_test([AGENT])
def stock_qemu_guest_moves_between_memds():
    def moves(hosts):
        guest = move_and_verify(hosts)
        if any("ready" in line for line in guest.console.lines()):
            raise Failure("the guest at the destination has begun anew")
        hosts.destination.wait_shared(18 * 256 * 9 // 10)
        guest.report()
        guest.kill()
        place = os.path.join(hosts.destination.directory, f"{guest.name}.vmm")
        wait_for("its monitor's place to go", lambda: not os.path.exists(place), 30)
    two_qemus(moves)


@live_test([AGENT])
def stock_qemu_guest_moves_between_networks_under_tls():
    with Wire() as wire:
        two_qemus(move_and_verify, wire)


@live_test([AGENT])
def stock_qemu_guest_runs_before_its_memory_has_come():
    """All of it is fetched while QEMU loads its devices and the guest runs."""
    def moves(hosts):
        hosts.start()
        report, guest = hosts.completes("--postcopy-only")
        if report["pages_demand"] == 0 or report["postcopy_s"] <= 0:
            raise Failure(f"nothing was fetched: {report}")
        guest.wait_rounds(2)
        guest.report()
    two_qemus(moves)


@live_test([AGENT])
def stock_qemu_guest_that_can_not_go_is_left_alone():
    """Refused by name, before anything is changed; after it has changed for the better, it goes."""
    def stays(hosts):
        hosts.start()
        monitor = Qmp(hosts.test_monitor)
        monitor.run("stop")
        hosts.begin()
        reason = hosts.fails()["reason"]
        if "the guest does not run: QEMU says 'paused'" not in reason:
            raise Failure(f"a guest that its operator has stopped: {reason}")
        if monitor.run("query-status")["status"] != "paused":
            raise Failure("memd lets a guest run that its operator has stopped")
        monitor.run("cont")
        hosts.nothing_arrived()
        hosts.begin()
        _, guest = hosts.completes()
        guest.report()
    two_qemus(stays)


@live_test([AGENT])
def stock_qemu_guest_outlives_a_mover_that_is_killed_while_it_stands_still():
    """What the mover has done to QEMU is known to nobody: the next one finds out."""
    def outlives(hosts):
        hosts.start()
        monitor = Qmp(hosts.test_monitor)
        hosts.begin("--postcopy-only")
        mover = wait_for("its mover", lambda: hosts.source.guest_status(hosts.name)["migration"] and
                         hosts.status_at(hosts.source)["pid"], 30, 0.01)
        while not any(event["event"] == "STOP" for event in monitor.events):
            monitor.run("query-status")
        os.kill(mover, signal.SIGKILL)
        status, report, why = hosts.end()
        if status == 0:  # it was too late, or it was begun again
            hosts.arrived().report()
        elif report.get("status") != "failed_source_runs":
            raise Failure(f"memctl migrate ended with {status}: {why} {report}")
        else:
            hosts.nothing_arrived()
    two_qemus(outlives)
