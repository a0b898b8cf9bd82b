# SPDX-License-Identifier: Apache-2.0
"""What this machine is and what its kernel says about processes. Reads only."""
import functools
import json
import os
import subprocess
import tempfile
import time

PAGE = 4096
ROOT = os.path.realpath(os.path.join(os.path.dirname(__file__), "../../.."))
QEMU = os.environ.get("MEMD_QEMU", "qemu-system-x86_64")
KVM_LIMIT_S = 10


def build_dir():
    return os.environ.get("MEMD_BUILD", os.path.join(ROOT, "build"))


def program(name):
    return os.path.join(build_dir(), "bin", name)


def library(name="libmemd-preload.so"):
    return os.path.join(build_dir(), "lib", name)


def needs_build():
    if not os.path.exists(program("memd")):
        raise SystemExit(f"nothing is built in {build_dir()}: tests/support/build check")


def guest_files():
    """The directory with vmlinuz and initramfs; made on the first call."""
    made = subprocess.run([os.path.join(ROOT, "tests/guest/make")], stdout=subprocess.PIPE, text=True)
    if made.returncode != 0:
        raise SystemExit("no guest to boot: tests/guest/make failed")
    return made.stdout.strip()


def boots_under_kvm(files):
    """/dev/kvm being there proves nothing: tries whether a real kernel gets to user space."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    with tempfile.NamedTemporaryFile() as out:
        qemu = subprocess.Popen(
            [QEMU, "-nodefaults", "-display", "none", "-no-reboot", "-m", "128M", "-accel", "kvm",
             "-cpu", "host", "-kernel", files + "/vmlinuz", "-initrd", files + "/initramfs",
             "-append", "console=ttyS0 quiet panic=-1 no_timer_check", "-serial", "stdio"],
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        try:
            return _says_ready(qemu, out.name)
        finally:
            qemu.kill()
            qemu.wait()


def _says_ready(qemu, path):
    deadline = time.monotonic() + KVM_LIMIT_S
    while qemu.poll() is None and time.monotonic() < deadline:
        with open(path, "rb") as said:
            if b"memd-guest: ready" in said.read():
                return True
        time.sleep(0.1)
    return False


def accelerator(files):
    """'kvm' or 'tcg'; tried once, and remembered for this run and its children in MEMD_ACCEL."""
    if os.environ.get("MEMD_ACCEL") not in ("kvm", "tcg"):
        os.environ["MEMD_ACCEL"] = "kvm" if boots_under_kvm(files) else "tcg"
    return os.environ["MEMD_ACCEL"]


@functools.lru_cache
def memvm_obstacle():
    """Why memvm can't run its guest on this host; '' when it can. Tried by booting."""
    if not os.path.exists(program("memvm")):
        return "memvm was not built (it is for x86-64)"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "no /dev/kvm that can be used"
    with tempfile.NamedTemporaryFile() as out:
        memvm = subprocess.Popen([program("memvm"), program("bare-guest"), "common=64K"],
                                 stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        try:
            return "" if _says_ready(memvm, out.name) else "/dev/kvm is there, but memvm's guest does not run under it"
        finally:
            memvm.kill()
            memvm.wait()


# Without one of these no agent can share; names of `memctl doctor`.
AGENT_NEEDS = ("userfaultfd", "userfaultfd features", "UFFDIO_MOVE", "PAGEMAP_SCAN")


@functools.lru_cache
def agent_obstacle():
    """Why the agent can't share on this host, in `memctl doctor`'s words; '' when it can."""
    done = subprocess.run([program("memctl"), "doctor", "--json"], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    checks = json.loads(done.stdout)["checks"]
    return "; ".join(f"{check['check']}: {check['found']}" for check in checks
                     if check["check"] in AGENT_NEEDS and check["status"] not in ("ok", "note"))


def rollup(pid):
    """/proc/PID/smaps_rollup in bytes, by field ('Pss', 'Rss', ...); empty when it is gone."""
    fields = {}
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            for line in file:
                words = line.split()
                if len(words) == 3 and words[2] == "kB":
                    fields[words[0].rstrip(":")] = int(words[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return fields


def pss_bytes(pids):
    return sum(rollup(pid).get("Pss", 0) for pid in pids)


def cpu_seconds(pid):
    """User and system time of all threads of a process, ended ones too."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def vmas(pid):
    with open(f"/proc/{pid}/maps") as file:
        return sum(1 for _ in file)


def threads(pid):
    try:
        return [int(tid) for tid in os.listdir(f"/proc/{pid}/task")]
    except FileNotFoundError:
        return []


def thread_name(pid, tid):
    try:
        with open(f"/proc/{pid}/task/{tid}/comm") as file:
            return file.read().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def maps_library(pid, name):
    with open(f"/proc/{pid}/maps") as file:
        return any(name in line for line in file)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def memfds(pids, prefix="memd"):
    """The memd memfds that these processes hold, by descriptor or by mapping, as a set of inodes."""
    found = set()
    for pid in pids:
        found |= _memfds_by_descriptor(pid, prefix) | _memfds_by_mapping(pid, prefix)
    return found


def _memfds_by_descriptor(pid, prefix):
    found = set()
    try:
        for entry in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{entry}"
            if os.readlink(path).startswith(f"/memfd:{prefix}"):
                found.add(os.stat(path).st_ino)
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found


def _memfds_by_mapping(pid, prefix):
    found = set()
    try:
        with open(f"/proc/{pid}/maps") as file:
            for line in file:
                if f"/memfd:{prefix}" in line:
                    found.add(int(line.split()[4]))
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found


def all_pids():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def as_bytes(size):
    """'64M' -> 67108864; numbers pass."""
    if isinstance(size, int):
        return size
    units = {"K": 10, "M": 20, "G": 30, "T": 40}
    return int(size[:-1]) << units[size[-1]] if size[-1] in units else int(size)


if __name__ == "__main__":  # for shell scripts: prints the accelerator
    print(accelerator(guest_files()))
