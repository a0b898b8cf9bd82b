# SPDX-License-Identifier: Apache-2.0
"""memvm under memd: how long a guest stands still whose VMM saves and loads in no time."""
from lab import Failure, Lab, api, wait_for
from lab.network import free_port

NAME, MEMORY = "moves", "1G"
HOLDS = {"unique": "512M", "twin": "64M", "hot": "16M", "duty": 60}


def move_memvm():
    """{name: number} of a guest of 1 GiB, more than half of it filled, that verifies all of that there."""
    address = f"127.0.0.1:{free_port()}"
    with Lab(network=None) as source, Lab(network=None) as destination:
        source.start_memd({"migration": {"plain": "yes"}})
        destination.start_memd({"migration": {"plain": "yes", "listen": address},
                                **destination.awaits_memvm(NAME, memory=MEMORY)})
        guest = source.start_memvm(NAME, memory=MEMORY, **HOLDS)
        guest.wait_ready()
        source.wait_connected(NAME)
        guest.wait_rounds(1)
        status, answer = api.request(source.socket, "POST", f"/v1/guests/{NAME}/migrate",
                                     {"to": address, "postcopy_only": True})
        if status // 100 != 2:
            raise Failure(f"memd does not move the guest: {answer}")

        def report():
            return source.get(f"/v1/guests/{NAME}/migrate")
        wait_for("the migration to end", lambda: report()["status"] != "running", 300, 0.02)
        figures = report()
        if figures["status"] != "completed":
            raise Failure(f"the migration: {figures}")
        wait_for("the VMM at the source to end", lambda: not guest.is_alive(), 60)
        destination.arrived_memvm(NAME).report()
        return {"memvm_downtime_ms": figures["downtime_s"] * 1000}
