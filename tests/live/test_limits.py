# SPDX-License-Identifier: Apache-2.0
"""Something is full, missing or not allowed: a clear word, and a guest that runs on."""
import os
import subprocess

from lab import Failure, Lab, PAGE, Skip, machine, wait_for
from lab.suite import AGENT, live_test

MIB_PAGES = (1 << 20) // PAGE
NOBODY = 65534


def expect_reason(lab, name, *words, seconds=90):
    """`memctl guest` names what holds sharing back: one of the words is in it."""
    def named():
        reason = lab.guest_status(name)["reason"].lower()
        return any(word in reason for word in words)
    try:
        wait_for("a reason", named, seconds, 0.5)
    except Failure:
        raise Failure(f"{name}: no word of {words} in the reason: {lab.guest_status(name)['reason']!r}")


def expect_runs_on(guest):
    guest.wait_rounds(5)
    guest.report()


@live_test([AGENT])
def vma_budget_is_reached():
    """Every second page is shared, so each share costs a mapping; the limit that these two VMMs
    read is 2500 instead of the kernel's."""
    few = {"/proc/sys/vm/max_map_count": "2500\n"}
    with Lab() as lab:
        lab.start_memd(domains={"pair": [0]})
        guests = [lab.start_guest(name, domain="pair", mosaic="64M", churn="4M", over=few)
                  for name in ("left", "right")]
        for guest in guests:
            guest.wait_ready()
        lab.wait_shared(200)
        for guest in guests:
            expect_reason(lab, guest.name, "vma", "max_map_count", "mappings")
            if machine.vmas(guest.pid) > 2500:
                raise Failure(f"{guest.name} has {machine.vmas(guest.pid)} mappings")
        lab.report_all()


@live_test([AGENT])
def store_is_full():
    with Lab() as lab:
        lab.start_memd({"store": {"budget": "8M"}}, {"pair": [0]})
        guests = [lab.start_guest(name, domain="pair", common="64M", churn="8M", hot="4M")
                  for name in ("left", "right")]
        for guest in guests:
            guest.wait_ready()
        lab.wait_shared(6 * MIB_PAGES)
        for guest in guests:
            guest.wait_rounds(10)
        if lab.sharing()["pages_shared"] > 8 * MIB_PAGES:
            raise Failure(f"the store outgrew its budget: {lab.sharing()}")
        expect_reason(lab, "left", "store")
        lab.report_all()


@live_test([AGENT])
def no_userfaultfd():
    """An unprivileged VMM, and a memd that finds no /dev/userfaultfd to hand on."""
    with open("/proc/sys/vm/unprivileged_userfaultfd") as file:
        if file.read().strip() != "0":
            raise Skip("vm.unprivileged_userfaultfd is 1: everybody has userfaultfd")
    if not os.path.exists("/dev/userfaultfd"):
        raise Skip("no /dev/userfaultfd")
    with Lab() as lab:
        lab.start_memd(over={"/dev/userfaultfd": ""})
        guest = lab.start_guest("poor", memory="128M", uid=NOBODY, twin="16M", zero="8M", hot="4M")
        guest.wait_ready()
        expect_reason(lab, "poor", "userfaultfd")
        if machine.memfds([guest.pid]) and lab.guest_status("poor")["places"]["shared"]:
            raise Failure("it shares without userfaultfd?")
        expect_runs_on(guest)


@live_test([AGENT])
def unprivileged_vmm_gets_userfaultfd_from_memd():
    if not os.path.exists("/dev/userfaultfd"):
        raise Skip("no /dev/userfaultfd")
    with Lab() as lab:
        lab.start_memd()
        guest = lab.start_guest("modest", memory="128M", uid=NOBODY, twin="16M", zero="8M", hot="4M")
        guest.wait_ready()
        lab.wait_shared(12 * MIB_PAGES * 9 // 10)
        expect_runs_on(guest)


@live_test([AGENT])
def locked_memory_is_left_alone():
    with Lab() as lab:
        lab.start_memd()
        guest = lab.start_guest("locked", memory="128M", twin="16M", zero="8M",
                                devices=["-overcommit", "mem-lock=on"])
        guest.wait_ready()
        expect_reason(lab, "locked", "lock")
        places = lab.guest_status("locked")["places"]
        if places["shared"] or places["zero"]:
            raise Failure(f"pages of a locked VMM were taken: {places}")
        expect_runs_on(guest)


@live_test()
def static_vmm_runs_without_the_agent():
    program = machine.program("static_vmm")
    with Lab() as lab:
        lab.start_memd()
        command = [machine.program("memctl"), "--socket", lab.socket, "run", "--name", "static",
                   "--max", "64M", "--", program]
        vmm = lab.spawn(command, "static.out")
        wait_for("the static VMM", lambda: "small_vmm: ready" in lab.log("static.out"), 30)
        told = lab.guest_status("static")
        if told["engine"] != "kernel" or "static" not in told["reason"]:
            raise Failure(f"engine {told['engine']}, reason {told['reason']!r}")
        if "static" not in lab.log("static.out").split("small_vmm: ready")[0]:
            raise Failure("memctl run said nothing about it")
        vmm.terminate()
        if vmm.wait(30) != 7:
            raise Failure(f"the VMM's own exit status is 7, memctl run ended with {vmm.returncode}")


def end_of_run(lab, *words):
    """The exit status of `memctl run` and what it and its VMM said."""
    status, out, err = lab.memctl("run", *words)
    return status, out + err


@live_test()
def no_memd_no_guest():
    """3, and nothing was started."""
    with Lab() as lab:
        mark = os.path.join(lab.directory, "started")
        status, words = end_of_run(lab, "--name", "a", "--max", "64M", "--", "touch", mark)
        if status != 3 or os.path.exists(mark):
            raise Failure(f"status {status}, started: {os.path.exists(mark)}: {words}")


@live_test()
def run_statuses_say_who_failed():
    """2: the command line; 4: memd refused; afterwards the VMM's own."""
    with Lab() as lab:
        lab.start_memd()
        expected = [(2, ["--name", "no/slashes", "--max", "64M", "--", "true"]),
                    (2, ["--name", "a", "--max", "64X", "--", "true"]),
                    (2, ["--name", "a", "--max", "64M"]),
                    (7, ["--name", "a", "--max", "64M", "--", "sh", "-c", "exit 7"]),
                    (0, ["--name", "a", "--max", "64M", "--", "true"])]
        for wanted, words in expected:
            status, said = end_of_run(lab, *words)
            if status != wanted:
                raise Failure(f"memctl run {' '.join(words)}: {status} instead of {wanted}: {said}")


@live_test()
def user_without_rights_starts_nothing():
    with Lab() as lab:
        lab.start_memd()
        mark = os.path.join(lab.directory, "of-nobody")
        memctl = lab.stage() + "/bin/memctl"
        done = subprocess.run(["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY),
                               "--clear-groups", memctl, "--socket", lab.socket, "run", "--name",
                               "sly", "--max", "64M", "--", "touch", mark], stderr=subprocess.PIPE)
        if done.returncode != 4 or os.path.exists(mark) or lab.status()["guests"]:
            raise Failure(f"memctl run of a stranger ended with {done.returncode}: {done.stderr}")


@live_test()
def name_of_a_living_guest_is_taken():
    with Lab() as lab:
        lab.start_memd()
        lab.spawn([machine.program("memctl"), "--socket", lab.socket, "run", "--name", "twice",
                   "--max", "64M", "--", machine.program("static_vmm")], "first.out")
        wait_for("the first", lambda: "small_vmm: ready" in lab.log("first.out"), 30)
        status, words = end_of_run(lab, "--name", "twice", "--max", "64M", "--", "true")
        if status != 4:
            raise Failure(f"the second of that name ended with {status}: {words}")


@live_test()
def guarantees_that_the_budget_cannot_carry_are_refused():
    with Lab() as lab:
        lab.start_memd({"host": {"budget": "256M"}})
        status, words = end_of_run(lab, "--name", "big", "--max", "1G", "--min", "512M", "--", "true")
        if status != 4:
            raise Failure(f"512M were guaranteed out of 256M: {status}: {words}")
