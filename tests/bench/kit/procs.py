# SPDX-License-Identifier: Apache-2.0
"""CPU time and memory of processes, as the kernel counts them. Seconds and bytes."""
import os

TICKS = os.sysconf("SC_CLK_TCK")
SIGSEGV_BLOCKED = 1 << 10
STIME, PPID = 12, 1  # fields of /proc/PID/stat behind the name


def read(path):
    with open(path, errors="replace") as file:
        return file.read()


def _stat(path):
    return read(path).rpartition(")")[2].split()


def threads(pid):
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except FileNotFoundError:
        return []


def thread_name(pid, tid):
    return read(f"/proc/{pid}/task/{tid}/comm").strip()


def _threads_where(pid, wanted):
    found = []
    for tid in threads(pid):
        try:
            if wanted(tid):
                found.append(tid)
        except (FileNotFoundError, ProcessLookupError):
            pass  # it ended meanwhile
    return found


def agent_threads(pid):
    """The agent's threads in a VMM block every signal, SIGSEGV too. No thread of QEMU's does."""
    def blocks_all(tid):
        line = next(line for line in read(f"/proc/{pid}/task/{tid}/status").splitlines()
                    if line.startswith("SigBlk:"))
        return int(line.split()[1], 16) & SIGSEGV_BLOCKED
    return _threads_where(pid, blocks_all)


def status_readers(pid):
    """memd's threads that read smaps_rollup for `memctl status`: io_uring's workers, which do
    nothing else there. What they use is the price of being watched, not of sharing."""
    return _threads_where(pid, lambda tid: thread_name(pid, tid).startswith("iou-wrk"))


def thread_cpu(pid, tid):
    """On a CPU so far, to the nanosecond."""
    try:
        return int(read(f"/proc/{pid}/task/{tid}/schedstat").split()[0]) / 1e9
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0.0


def thread_system_time(pid, tid):
    try:
        return int(_stat(f"/proc/{pid}/task/{tid}/stat")[STIME]) / TICKS
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0.0


def kernel_thread(name):
    """The pid of a kernel thread (a child of kthreadd, pid 2)."""
    for pid in (word for word in os.listdir("/proc") if word.isdigit()):
        try:
            if read(f"/proc/{pid}/comm").strip() == name and _stat(f"/proc/{pid}/stat")[PPID] == "2":
                return int(pid)
        except (FileNotFoundError, ProcessLookupError):
            pass
    return None


class CpuSum:
    """The CPU time of a changing set of threads since this was made (from_zero: since they were).
    What a thread used that came and went between two looks is lost."""

    def __init__(self, list_threads, read_thread=thread_cpu, from_zero=False):
        self._list = list_threads
        self._read = read_thread
        self._first = {} if from_zero else {key: read_thread(*key) for key in list_threads()}
        self._last = dict(self._first)

    def seconds(self):
        for key in self._list():
            value = self._read(*key)
            self._first.setdefault(key, 0.0)
            self._last[key] = max(value, self._last.get(key, 0.0))
        return sum(self._last[key] - self._first[key] for key in self._last)


# ---- memory ----

class Vma:
    """One mapping of /proc/PID/smaps; sizes in bytes."""

    def __init__(self, head):
        words = head.split(None, 5)
        self.start, self.end = (int(word, 16) for word in words[0].split("-"))
        self.rights = words[1]
        self.inode = int(words[4])
        self.path = words[5].strip() if len(words) > 5 else ""
        self.sizes = {}
        self.flags = set()

    def take(self, name, words):
        if name == "VmFlags":
            self.flags = set(words)
        elif words and words[-1] == "kB":
            self.sizes[name] = int(words[0]) * 1024

    def is_private_file(self):
        return self.inode != 0 and self.rights.endswith("p")

    def lies_in(self, blocks):
        return any(self.start < end and self.end > start for start, end in blocks)


def _is_head(line):
    return "-" in line.split(None, 1)[0]


def maps(pid):
    """All mappings, without sizes and flags."""
    return [Vma(line) for line in read(f"/proc/{pid}/maps").splitlines()]


def smaps(pid):
    vmas = []
    for line in read(f"/proc/{pid}/smaps").splitlines():
        if _is_head(line):
            vmas.append(Vma(line))
        else:
            name, _, rest = line.partition(":")
            vmas[-1].take(name, rest.split())
    return vmas


def page_table_bytes(pid):
    return next(int(line.split()[1]) * 1024 for line in read(f"/proc/{pid}/status").splitlines()
                if line.startswith("VmPTE:"))
