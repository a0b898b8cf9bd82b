# SPDX-License-Identifier: Apache-2.0
"""Guests that move between two memds: memvm under the real /dev/kvm, live, and what goes wrong on the way."""
import contextlib
import json
import os
import socket

from lab import Failure, Lab, machine, wait_for
from lab.suite import AGENT, MEMVM, live_test

REGIONS = {"common": "4M", "twin": "2M", "zero": "3M", "text": "1M", "unique": "2M", "churn": "512K",
           "hot": "512K", "duty": 20}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Hosts:
    """Two labs that stand for two hosts, and a guest that runs on the first."""

    def __init__(self, source, destination):
        self.source = source
        self.destination = destination
        self.port = free_port()
        self.guest = None

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    def start(self, name="moves", cpus=1, migration=None, **regions):
        keys = migration or {"plain": "yes"}
        self.source.start_memd({"migration": keys})
        self.destination.start_memd({"migration": {"listen": self.address, **keys},
                                     **self.destination.awaits_memvm(name, cpus=cpus)})
        self.guest = self.source.start_memvm(name, cpus=cpus, **{**REGIONS, **regions})
        self.guest.wait_ready()
        self.source.wait_connected(name)
        self.guest.wait_rounds(1)

    def migrate(self, *options):
        """(exit status, report, words)"""
        status, said, why = self.source.memctl("migrate", self.guest.name, self.address, "--json", *options)
        return status, json.loads(said) if said else None, why

    def stage(self):
        return self.source.get(f"/v1/guests/{self.guest.name}/migrate")["stage"]

    def arrived(self):
        """The guest at the destination, after it was seen that nothing runs at the source."""
        wait_for("the VMM at the source to end", lambda: not self.guest.is_alive(), 60)
        return self.destination.arrived_memvm(self.guest.name)


@contextlib.contextmanager
def two_hosts():
    with Lab() as source, Lab() as destination:
        hosts = Hosts(source, destination)
        try:
            yield hosts
        except BaseException:
            source.failed = destination.failed = True
            raise


def check_report(report):
    if report["status"] != "completed" or report["downtime_s"] <= 0 or report["total_s"] <= 0:
        raise Failure(f"the report: {report}")


@live_test([AGENT, MEMVM])
def memvm_guest_moves_and_verifies():
    with two_hosts() as hosts:
        hosts.start()
        before = hosts.guest.report()
        status, report, why = hosts.migrate()
        if status != 0:
            raise Failure(f"memctl migrate ended with {status}: {why} {report}")
        check_report(report)
        guest = hosts.arrived()
        guest.wait_rounds(1)
        after = guest.report()
        if int(after["rounds"]) < int(before["rounds"]):
            raise Failure(f"the guest did not go on: {before} and then {after}")
        hosts.destination.wait_connected(guest.name)
