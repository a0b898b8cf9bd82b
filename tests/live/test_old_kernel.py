# SPDX-License-Identifier: Apache-2.0
"""A kernel without UFFDIO_MOVE, for real: memd and two small VMMs run inside a guest whose kernel is
Debian 12's 6.1. There is no agent there; kernel KSM shares, and the words say why."""
import json
import os
import re
import shutil
import subprocess

from lab import Failure, Lab, Skip, machine
from lab.guest import SAYS
from lab.suite import live_test

HERE = os.path.dirname(os.path.realpath(__file__))
CONFIG = "[host]\nstate_dir = /var/lib/memd\n[sharing]\nrevisit_s = 1\n"


def guest_kernel_release(files):
    with open(files + "/config") as file:
        return tuple(int(n) for n in re.search(r"Linux/\S+ (\d+)\.(\d+)", file.read()).groups())


def libraries(program):
    """Absolute paths of everything that the loader would bring, the loader too."""
    done = subprocess.run(["ldd", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return set(re.findall(r"(/\S+) \(0x", done.stdout)) if done.returncode == 0 else set()


def pack(lab, tree):
    """A second archive behind the guest's own: memd with its libraries, the VMMs and the script."""
    os.makedirs(tree + "/test/bin")
    os.makedirs(tree + "/test/lib")
    needed = set()
    for name in ("memd", "memctl", "static_vmm", "dynamic_vmm"):
        shutil.copy(machine.program(name), f"{tree}/test/bin/{name}")
        needed |= libraries(machine.program(name))
    shutil.copy(machine.library(), tree + "/test/lib/")
    for path in needed | libraries(machine.library()):
        os.makedirs(os.path.dirname(tree + path), exist_ok=True)
        shutil.copy(os.path.realpath(path), tree + path)
    shutil.copy(HERE + "/old_kernel_run", tree + "/test/run")
    os.chmod(tree + "/test/run", 0o755)
    with open(tree + "/test/memd.conf", "w") as file:
        file.write(CONFIG)
    archive = subprocess.run(f"cd {tree} && find . | cpio --quiet -H newc -o", shell=True, check=True,
                             stdout=subprocess.PIPE).stdout
    both = os.path.join(lab.directory, "initramfs")
    with open(both, "wb") as out, open(os.path.join(machine.guest_files(), "initramfs"), "rb") as first:
        shutil.copyfileobj(first, out)
        out.write(archive)
    return both


def said(lines, words):
    line = next((line for line in lines if line.startswith(SAYS + words)), None)
    if line is None:
        raise Failure(f"the guest never said '{words}'; its last words: {lines[-8:]}")
    return line[len(SAYS + words):].strip()


def check_vmm(lines, name, engine, reason):
    told = json.loads(said(lines, f"guest {name}"))
    if told["engine"] != engine or not re.search(reason, told["reason"], re.I):
        raise Failure(f"{name}: engine {told['engine']}, reason {told['reason']!r}")
    if said(lines, f"ended {name}") != "status=7":
        raise Failure(f"{name} ended otherwise: {said(lines, f'ended {name}')}")


@live_test()
def kernel_without_move_shares_through_ksm():
    files = machine.guest_files()
    if guest_kernel_release(files) >= (6, 8):
        raise Skip("the guests' kernel is 6.8 or later and has UFFDIO_MOVE")
    with Lab() as lab:
        initramfs = pack(lab, os.path.join(lab.directory, "tree"))
        guest = lab.start_guest("old", memory="512M", plain=True, initramfs=initramfs)
        guest.wait_ready(240)
        lines = guest.console.lines()
        status = json.loads(said(lines, "status"))
        if status["sharing"]["pages_sharing"] < 8000:
            raise Failure(f"KSM shared next to nothing: {status['sharing']}; {said(lines, 'log')}")
        check_vmm(lines, "static_vmm", "kernel", "static")
        check_vmm(lines, "dynamic_vmm", "kernel", "move|6.8|kernel")
