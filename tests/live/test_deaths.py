# SPDX-License-Identifier: Apache-2.0
"""memd and VMMs die without a word at any moment: who survives keeps its memory."""
import itertools
import os
import random
import time

from lab import Failure, Lab, machine, wait_for
from lab.suite import AGENT, live_test, short_or_full

REGIONS = {"memory": "128M", "domain": "many", "common": "20M", "twin": "4M", "zero": "6M",
           "unique": "4M", "churn": "4M", "hot": "2M", "duty": 5}
GUESTS = 4


def living(lab):
    return [guest for guest in lab.guests.values() if guest.is_alive()]


def report_of_the_ready(lab):
    tags = [(guest, guest.ask("report")) for guest in living(lab) if guest.is_ready()]
    for guest, tag in tags:
        guest.judge(guest.await_answer(tag, "report"))


def kill_one(lab, chance, numbers):
    """memd (which comes back at once) or a guest (another takes its place)."""
    if chance.random() < 0.5:
        lab.kill_memd()
        lab.start_memd()
        return
    chance.choice(living(lab)).kill()
    lab.start_guest(f"g{next(numbers)}", **REGIONS)


def no_segment_left(lab):
    """Without guests nothing of a store is left, neither in memd nor in its figures."""
    sharing = lab.sharing()
    return sharing["pages_shared"] == 0 and not machine.memfds([lab.memd.pid])


@live_test([AGENT], limit_minutes=8, full_minutes=60)
def kill_9_at_random_moments():
    seed = int(os.environ.get("MEMD_SEED", random.randrange(1 << 30)))
    chance, numbers = random.Random(seed), itertools.count(1)
    print(f"kill_9_at_random_moments: MEMD_SEED={seed}", flush=True)
    with Lab() as lab:
        lab.start_memd({"host": {"grace_s": 5}}, {"many": [0]})
        for _ in range(GUESTS):
            lab.start_guest(f"g{next(numbers)}", **REGIONS)
        for guest in living(lab):
            guest.wait_ready()
        for _ in range(short_or_full(20, 200)):
            time.sleep(chance.uniform(0, 3))  # the random moment, no synchronisation
            kill_one(lab, chance, numbers)
            report_of_the_ready(lab)
        survivors = living(lab)
        for guest in survivors:
            guest.wait_ready()
        lab.wait_connected(*[guest.name for guest in survivors])
        lab.wait_shared(20 * 256 * (GUESTS - 1) * 9 // 10)
        lab.report_all()
        for guest in survivors:
            guest.kill()
        wait_for("the segments to be retired", lambda: no_segment_left(lab), 60, 0.5)


@live_test([AGENT])
def guests_live_on_when_memd_never_returns():
    with Lab() as lab:
        lab.start_memd(domains={"many": [0]})
        guests = [lab.start_guest(name, **{**REGIONS, "duty": 30}) for name in ("a", "b")]
        for guest in guests:
            guest.wait_ready()
        lab.wait_shared(20 * 256 * 9 // 10)
        lab.kill_memd()
        for guest in guests:  # shares go on breaking, served by the agents alone
            guest.wait_rounds(40)
        lab.report_all()


@live_test([AGENT])
def restarted_memd_takes_agents_and_segments_back():
    with Lab() as lab:
        lab.start_memd(domains={"many": [0]})
        guests = [lab.start_guest(name, **REGIONS) for name in ("a", "b")]
        for guest in guests:
            guest.wait_ready()
        lab.wait_shared(20 * 256 * 9 // 10)
        segments = machine.memfds([guests[0].pid]) & machine.memfds([guests[1].pid])
        lab.kill_memd()
        lab.start_memd()
        lab.wait_connected("a", "b")
        wait_for("the old shares to be known again",
                 lambda: lab.sharing()["pages_sharing"] >= 20 * 256 * 9 // 10, 60)
        if not segments & machine.memfds([guests[0].pid]):
            raise Failure("after the restart the shares were made anew instead of taken back")
        lab.report_all()


@live_test([AGENT])
def memd_told_to_stop_leaves_the_guests_running():
    with Lab() as lab:
        lab.start_memd()
        guest = lab.start_guest("stays", memory="128M", twin="16M", hot="4M")
        guest.wait_ready()
        lab.wait_shared(11 * 256)
        lab.memd.terminate()
        wait_for("memd to end", lambda: lab.memd.poll() is not None, 30)
        if lab.memd.returncode != 0:
            raise Failure(f"memd ended with {lab.memd.returncode}")
        guest.wait_rounds(10)
        guest.report()
