# SPDX-License-Identifier: Apache-2.0
"""Guests that move between two memds: memvm under the real /dev/kvm, live, and what goes wrong on the way."""
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import time

from lab import Failure, Lab, Skip, machine, wait_for
from lab.certificates import Authority
from lab.network import Wire, free_port
from lab.suite import AGENT, MEMVM, live_test, short_or_full

REGIONS = {"common": "4M", "twin": "2M", "zero": "3M", "text": "1M", "unique": "2M", "churn": "512K",
           "hot": "512K", "duty": 20}
PORT = 7007


class Hosts:
    """Two labs that stand for two hosts, and a guest that runs on the first. With a wire each is in a
    network of its own and they speak TLS, else both are on the loopback and speak in the clear."""

    def __init__(self, source, destination, wire=None):
        self.source = source
        self.destination = destination
        self.wire = wire
        self.address = f"{wire.addresses[1]}:{PORT}" if wire else f"127.0.0.1:{free_port()}"
        self.guest = None
        self.name = None
        self._mover = None

    def keys(self):
        """[migration] of both."""
        if not self.wire:
            return {"plain": "yes"}, {"plain": "yes"}
        authority = Authority(os.path.join(self.source.directory, "authority"))
        return [authority.certify(name, address) for name, address in
                zip(("source", "destination"), self.wire.addresses)]

    def start(self, name="moves", cpus=1, ports=None, **regions):
        of_source, of_destination = self.keys()
        if ports:
            of_destination = {**of_destination, "ports": ports}
        self.source.start_memd({"migration": of_source})
        self.destination.start_memd({"migration": {"listen": self.address, **of_destination},
                                     **self.destination.awaits_memvm(name, cpus=cpus)})
        self.name = name
        self.guest = self.source.start_memvm(name, cpus=cpus, **{**REGIONS, **regions})
        self.guest.wait_ready()
        self.source.wait_connected(name)
        self.guest.wait_rounds(1)

    def begin(self, *options):
        """memctl migrate in the background."""
        self._mover = subprocess.Popen(
            [machine.program("memctl"), "--socket", self.source.socket, "migrate", self.name, self.address,
             "--json", *options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def start_to_move(self):
        """A guest runs at the destination, and nearly all of its memory is still to come."""
        self.start()
        self.begin("--postcopy-only", "--bandwidth", "1M")
        self.wait_stage("postcopy")

    def end(self, seconds=120):
        """(exit status, report, words)"""
        said, why = self._mover.communicate(timeout=seconds)
        return self._mover.returncode, json.loads(said) if said else {}, why

    def migrate(self, *options):
        self.begin(*options)
        return self.end()

    def completes(self, *options):
        """The report of a migration that must not fail, and the guest where it is now."""
        if options or not self._mover:
            self.begin(*options)
        status, report, why = self.end()
        if status != 0 or report.get("status") != "completed":
            raise Failure(f"memctl migrate ended with {status}: {why} {report}")
        return report, self.arrived()

    def fails(self, how="failed_source_runs"):
        status, report, why = self.end()
        if status != 1 or report.get("status") != how:
            raise Failure(f"memctl migrate ended with {status}: {why} {report}, not with {how}")
        return report

    def status_at(self, lab):
        return lab.get(f"/v1/guests/{self.name}/migrate")

    def wait_stage(self, stage, seconds=60):
        def there():
            if not self.source.guest_status(self.name)["migration"]:
                return False
            now = self.status_at(self.source)
            if now["status"] != "running":
                raise Failure(f"it is over before '{stage}': {now}")
            return now["stage"] == stage
        wait_for(f"stage {stage}", there, seconds, 0.02)

    def arrived(self):
        """The guest at the destination, after it was seen that nothing runs at the source."""
        wait_for("the VMM at the source to end", lambda: not self.guest.is_alive(), 60)
        return self.destination.arrived_memvm(self.name)

    def nothing_arrived(self):
        """The copy at the destination is gone, and the guest goes on at the source."""
        def gone():
            return not any(guest["name"] == self.name for guest in self.destination.status()["guests"])
        wait_for("the copy at the destination to end", gone, 60)
        self.guest.wait_rounds(1)
        self.guest.report()


@contextlib.contextmanager
def two_hosts(wire=None):
    networks = wire.names if wire else (None, None)
    with Lab(network=networks[0]) as source, Lab(network=networks[1]) as destination:
        hosts = Hosts(source, destination, wire)
        try:
            yield hosts
        except BaseException:
            source.failed = destination.failed = True
            raise


def check_report(report):
    if report["downtime_s"] <= 0 or report["total_s"] < report["downtime_s"] or report["bytes_sent"] <= 0:
        raise Failure(f"the report: {report}")
    if not report["downtime_s"] <= report["sharing_rested_s"] <= report["total_s"]:
        raise Failure(f"the report: {report}")


@live_test([AGENT, MEMVM])
def memvm_guest_moves_and_verifies():
    with two_hosts() as hosts:
        hosts.start()
        before = hosts.guest.report()
        report, guest = hosts.completes()
        check_report(report)
        guest.wait_rounds(1)
        after = guest.report()
        if int(after["rounds"]) < int(before["rounds"]):
            raise Failure(f"the guest did not go on: {before} and then {after}")
        hosts.destination.wait_connected(guest.name)


@live_test([AGENT, MEMVM])
def guest_of_two_vcpus_moves_between_networks_under_tls():
    with Wire() as wire, two_hosts(wire) as hosts:
        hosts.start(cpus=2)
        # No faster than this, or all may be there before the guest first looks.
        report, guest = hosts.completes("--postcopy-only", "--bandwidth", "8M")
        check_report(report)
        if report["pages_demand"] == 0 or report["fault_us"]["max"] == 0:
            raise Failure(f"no page was demanded: {report}")
        guest.wait_rounds(1)
        guest.report()


@live_test([AGENT, MEMVM])
def only_the_mover_that_is_waited_for_goes_before_others():
    """Its relays move bytes for as long as there are any."""
    with Wire() as wire, two_hosts(wire) as hosts:
        hosts.start_to_move()
        for lab in (hosts.source, hosts.destination):
            mover = hosts.status_at(lab)["pid"]
            first = {tid for tid in machine.threads(mover) if os.sched_getscheduler(tid) != os.SCHED_OTHER}
            if first != {mover} or len(machine.threads(mover)) != 3:
                raise Failure(f"of the threads {machine.threads(mover)} {first} have a priority")
        hosts.completes()[1].report()


@live_test([AGENT, MEMVM])
def precopy_alone_demands_nothing():
    with two_hosts() as hosts:
        hosts.start(duty=1)
        report, guest = hosts.completes("--precopy-only")
        if report["pages_demand"] != 0:
            raise Failure(f"pages were demanded: {report}")
        guest.report()


# ---- links that are cut ----

def cut(wire, chance):
    kind = chance.choice(("reset", "silence", "deaf source", "deaf destination"))
    if kind == "reset":
        wire.reset(chance.randrange(2))
        return
    wire.silence(*{"silence": (0, 1), "deaf source": (1,), "deaf destination": (0,)}[kind])
    time.sleep(chance.uniform(0.1, 1.5))  # the wire is silent for so long
    wire.mend()


def cut_often(hosts, chance, cuts):
    """While the pages move; what a cut interrupts may be the repair of the one before."""
    for number in range(cuts):
        time.sleep(chance.uniform(0, 0.8))  # the random moment
        if hosts.status_at(hosts.source)["status"] != "running":
            return number
        cut(hosts.wire, chance)
    return cuts


@live_test([AGENT, MEMVM], limit_minutes=8, full_minutes=90)
def cut_links_are_repaired_and_no_page_is_wrong():
    seed = int(os.environ.get("MEMD_SEED", random.randrange(1 << 30)))
    chance = random.Random(seed)
    print(f"cut_links_are_repaired_and_no_page_is_wrong: MEMD_SEED={seed}", flush=True)
    left = short_or_full(50, 1000)
    while left > 0:
        with Wire() as wire, two_hosts(wire) as hosts:
            hosts.start(duty=5)
            hosts.begin("--postcopy-only", "--bandwidth", "256K")
            hosts.wait_stage("postcopy")
            left -= cut_often(hosts, chance, min(left, 25))
            report, guest = hosts.completes()
            if report["reconnects"] == 0:
                raise Failure(f"nothing was repaired: {report}")
            guest.report()


@live_test([AGENT, MEMVM])
def link_cut_before_the_commit_begins_again_and_goes_on_where_it_was_meanwhile():
    with Wire() as wire, two_hosts(wire) as hosts:
        hosts.start()
        hosts.begin("--bandwidth", "1M")
        hosts.wait_stage("precopy")
        wire.silence(0, 1)
        hosts.nothing_arrived()
        wire.mend()
        report, guest = hosts.completes()
        if report["reconnects"] == 0:
            raise Failure(f"nothing is said of it: {report}")
        guest.report()


# ---- deaths ----

@live_test([AGENT, MEMVM])
def killed_memds_are_not_missed():
    with two_hosts() as hosts:
        hosts.start_to_move()
        for lab in (hosts.source, hosts.destination):
            lab.kill_memd()
        for lab in (hosts.source, hosts.destination):
            lab.start_memd()
        report, guest = hosts.completes()
        if report["reconnects"] != 0:
            raise Failure(f"the links did not outlive memd: {report}")
        guest.report()


@live_test([AGENT, MEMVM])
def killed_movers_are_replaced():
    with two_hosts() as hosts:
        hosts.start_to_move()
        for lab in (hosts.source, hosts.destination):
            before = hosts.status_at(lab)["pid"]
            os.kill(before, signal.SIGKILL)
            wait_for("another mover", lambda old=before, at=lab: hosts.status_at(at)["pid"] not in (0, old), 60)
        _, guest = hosts.completes()
        guest.report()


@live_test([AGENT, MEMVM])
def memd_and_mover_killed_together_are_replaced():
    with two_hosts() as hosts:
        hosts.start_to_move()
        for lab in (hosts.source, hosts.destination):
            mover = hosts.status_at(lab)["pid"]
            lab.kill_memd()
            os.kill(mover, signal.SIGKILL)
            lab.start_memd()
        _, guest = hosts.completes()
        guest.report()


@live_test([AGENT, MEMVM])
def mover_killed_before_the_commit_begins_again():
    for at_source in (True, False):
        with two_hosts() as hosts:
            hosts.start()
            hosts.begin("--bandwidth", "2M")
            hosts.wait_stage("precopy")
            os.kill(hosts.status_at(hosts.source if at_source else hosts.destination)["pid"], signal.SIGKILL)
            hosts.completes()[1].report()


@live_test([AGENT, MEMVM])
def destination_that_dies_before_the_commit_costs_nothing():
    with two_hosts() as hosts:
        hosts.start()
        hosts.begin("--bandwidth", "256K")
        hosts.wait_stage("precopy")
        os.kill(hosts.destination.guest_status(hosts.name)["pid"], signal.SIGKILL)
        hosts.fails()
        hosts.nothing_arrived()


@live_test([AGENT, MEMVM])
def destination_that_dies_after_the_commit_is_said_to_be_lost():
    with two_hosts() as hosts:
        hosts.start()
        hosts.begin("--postcopy-only", "--bandwidth", "256K")
        hosts.wait_stage("postcopy")
        rounds = hosts.guest.rounds()
        os.kill(hosts.destination.guest_status(hosts.name)["pid"], signal.SIGKILL)
        report = hosts.fails("failed_guest_lost")
        if not report["reason"]:
            raise Failure(f"nothing is said of it: {report}")
        if not hosts.guest.is_alive() or hosts.guest.rounds() != rounds:
            raise Failure("the source let the guest run again, or ended what is left of it")


@live_test([AGENT, MEMVM])
def memd_without_its_mover_says_so_and_moves_nothing():
    with two_hosts() as hosts:
        hosts.source.with_mover()
        hosts.start()
        hosts.begin()
        status, _, why = hosts.end()
        if status == 0:
            raise Skip("a memd-mover is installed here: memd takes that one")
        if status != 1 or "memd-mover is neither beside memd" not in why:
            raise Failure(f"memctl migrate ended with {status}: {why}")
        hosts.nothing_arrived()


@live_test([AGENT, MEMVM])
def mover_that_says_nothing_and_dies_ends_the_migration():
    with two_hosts() as hosts:
        hosts.source.with_mover("sleep 0.2")
        hosts.start()
        hosts.begin()
        report = hosts.fails()
        if "no mover stays alive" not in report["reason"]:
            raise Failure(f"it is not said why: {report}")
        hosts.nothing_arrived()


@live_test([AGENT, MEMVM])
def guest_that_moves_is_not_detached_and_what_is_left_of_it_not_saved():
    with two_hosts() as hosts:
        saved = os.path.join(hosts.source.directory, "saved")
        hosts.start(save=saved)
        hosts.begin("--postcopy-only", "--bandwidth", "1M")
        hosts.wait_stage("postcopy")
        for lab, way in ((hosts.source, "to"), (hosts.destination, "from")):
            said = " ".join(lab.memctl("guest", hosts.name)[1].split())
            if f"migration {way} 127.0.0.1" not in said or ": postcopy" not in said:
                raise Failure(f"memctl guest says nothing of the migration: {said}")
            status, said, why = lab.memctl("detach", hosts.name)
            if status != 4 or "it moves" not in why:
                raise Failure(f"memctl detach ended with {status}: {said} {why}")
        os.kill(hosts.guest.pid, signal.SIGTERM)
        hosts.fails("failed_guest_lost")
        if os.path.exists(saved):
            raise Failure("the VMM that it left has saved it: it could run twice")


@live_test([AGENT, MEMVM])
def cancelled_migration_leaves_the_guest_where_it_is():
    with two_hosts() as hosts:
        hosts.start()
        hosts.begin("--bandwidth", "256K")
        hosts.wait_stage("precopy")
        status, said, why = hosts.source.memctl("migrate", hosts.name, "--cancel")
        if status != 0:
            raise Failure(f"memctl migrate --cancel ended with {status}: {said} {why}")
        hosts.fails("cancelled")
        hosts.nothing_arrived()


# ---- who may not ----

@live_test([AGENT, MEMVM])
def guest_that_the_destination_does_not_know_is_refused():
    with two_hosts() as hosts:
        hosts.start()
        hosts.source.start_memvm("stranger", **REGIONS).wait_ready()
        hosts.source.wait_connected("stranger")
        hosts.name, hosts.guest = "stranger", hosts.source.guests["stranger"]
        hosts.begin()
        report = hosts.fails()
        if "has no [guest] section" not in report["reason"]:
            raise Failure(f"it is not said why: {report}")
        hosts.nothing_arrived()


@live_test([AGENT, MEMVM])
def guest_that_comes_when_its_ports_are_in_use_stays_where_it_is():
    """It moves when one is free, and by no other."""
    with two_hosts() as hosts, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        hosts.start(ports=f"{port}-{port}")
        hosts.begin()
        hosts.fails()
        if "all of [migration] ports are in use" not in hosts.destination.log("memd.log"):
            raise Failure("the destination does not say why")
        hosts.nothing_arrived()
        taken.close()
        hosts.begin()
        _, guest = hosts.completes()
        guest.report()


@live_test([AGENT, MEMVM])
def strangers_at_the_port_cost_nobody_anything():
    """Garbage, silence and a flood, while a guest moves."""
    with two_hosts() as hosts:
        hosts.start()
        place = ("127.0.0.1", int(hosts.address.rsplit(":", 1)[1]))
        strangers = [socket.create_connection(place) for _ in range(200)]
        for number, stranger in enumerate(strangers[::2]):
            with contextlib.suppress(OSError):
                stranger.sendall(random.Random(number).randbytes(4096))
        for stranger in strangers:
            stranger.close()
        deadline = time.monotonic() + 60

        def moves():
            hosts.begin()
            status, report, why = hosts.end()
            if status != 0 and time.monotonic() > deadline:
                raise Failure(f"{status} {report} {why}")
            return status == 0
        wait_for("the guest to get past the strangers", moves, 90, 0.5)
        hosts.arrived().report()
