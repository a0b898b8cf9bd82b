# SPDX-License-Identifier: Apache-2.0
"""Guest RAM from outside: plain dumps through /proc/PID/mem, and which of it is in huge pages. A
block of RAM is a pair of addresses (start, end) in its VMM."""
import array
import ctypes
import fcntl
import itertools
import json
import os
import struct
import subprocess
import time

from lab import PAGE, Failure, machine

from . import procs

HUGE = 2 << 20
PRESENT, SWAPPED = 1 << 63, 1 << 62
# The swap type of a marker: no page, only userfaultfd's note that there is none (it is the last of
# the 32 types; include/linux/swap.h).
SWAP_TYPE, MARKER = 31, 31
LOOKS = 3


def mergeable_blocks(pid, least=1 << 20):
    """What a QEMU without memd announced by madvise(MADV_MERGEABLE)."""
    return [(vma.start, vma.end) for vma in procs.smaps(pid)
            if "mg" in vma.flags and vma.end - vma.start >= least]


def largest_block(pid):
    """The largest writable anonymous mapping: guest RAM where nobody announced any."""
    vmas = [vma for vma in procs.maps(pid) if vma.inode == 0 and vma.rights == "rw-p"]
    largest = max(vmas, key=lambda vma: vma.end - vma.start)
    return [(largest.start, largest.end)]


# ---- dumps ----

class Dump:
    """A raw dump of a guest's blocks, laid end to end, in a file. Pages that the VMM does not have
    are not touched, and zeros in it. They are in `absent` too (a byte a page): no engine can save
    what takes no memory."""

    def __init__(self, pid, blocks, path):
        self.path = path
        self.absent = bytearray()
        self._unread = []
        with open(f"/proc/{pid}/mem", "rb") as mem, open(f"/proc/{pid}/pagemap", "rb") as pagemap, \
                open(path, "wb") as out:
            self._mem, self._pagemap, self._out = mem.fileno(), pagemap.fileno(), out.fileno()
            self._take(pid, blocks)

    def _take(self, pid, blocks):
        vmas = procs.maps(pid)
        for start, end in blocks:
            base = len(self.absent) * PAGE
            self.absent += bytes([1]) * ((end - start) // PAGE)
            for vma in vmas:
                low, high = max(start, vma.start), min(end, vma.end)
                for at in range(low, high, HUGE):
                    self._take_piece(vma, at, min(at + HUGE, high), base + at - start)
        os.ftruncate(self._out, len(self.absent) * PAGE)
        self._look_again()

    def _take_piece(self, vma, at, end, offset):
        """Up to 2 MiB of one mapping. A private file mapping (a page of memd's store) has its
        content whether it is present or not."""
        pages = (end - at) // PAGE
        there = [True] * pages if vma.is_private_file() else self._there(at, pages)
        index = 0
        for is_there, group in itertools.groupby(there):
            run = len(list(group))
            if is_there:
                self._copy(at + index * PAGE, run, offset + index * PAGE)
            index += run

    def _there(self, at, pages):
        entries = array.array("Q", os.pread(self._pagemap, pages * 8, at // PAGE * 8))
        if min(entries) >= PRESENT:
            return [True] * pages
        return [bool(entry & PRESENT or entry & SWAPPED and entry & SWAP_TYPE != MARKER)
                for entry in entries]

    def _copy(self, at, pages, offset):
        try:
            data = os.pread(self._mem, pages * PAGE, at)
        except OSError:
            data = b""
        whole = len(data) // PAGE
        os.pwrite(self._out, data[:whole * PAGE], offset)
        self.absent[offset // PAGE:offset // PAGE + whole] = bytes(whole)
        self._unread += [(at + i * PAGE, offset + i * PAGE) for i in range(whole, pages)]

    def _look_again(self):
        """A page that is frozen or being given back at this moment is there at the next."""
        for _ in range(LOOKS):
            missing, self._unread = self._unread, []
            if not missing:
                break
            time.sleep(0.02)
            for at, offset in missing:
                self._copy(at, 1, offset)


def dump_all(guests, directory, name):
    """One after the other, so that two dumps of one guest are as far apart as two calls."""
    return [Dump(guest.pid, guest.blocks, os.path.join(directory, f"{guest.name}.{name}"))
            for guest in guests]


def remove(*dumps):
    for dump in itertools.chain(*dumps):
        os.unlink(dump.path)


def shareable(first, second):
    """What analyze counts over the pages that are equal in both dumps of each guest: its figures,
    and `shareable_pages`, how many pages can be saved. Consumes the dumps."""
    words = [machine.program("memctl"), "analyze", "--json"]
    for dump in first:
        words += ["--since", dump.path]
    done = subprocess.run(words + [dump.path for dump in second], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise Failure(f"memctl analyze ended with {done.returncode}: {done.stderr.strip()}")
    counts = json.loads(done.stdout)
    absent = sum(both_absent(*pair) for pair in zip(first, second))
    remove(first, second)
    return {"pages": counts["pages"], "changed_pages": counts["changed_pages"], "absent_pages": absent,
            "zero_pages": counts["zero_pages"] - absent, "duplicate_pages": counts["duplicate_pages"],
            "shareable_pages": counts["duplicate_pages"] + counts["zero_pages"] - absent}


def both_absent(one, other):
    as_number = (int.from_bytes(dump.absent, "little") for dump in (one, other))
    return (next(as_number) & next(as_number)).bit_count()


# ---- what kind of pages there are ----

PAGEMAP_SCAN = 0xc0606610  # _IOWR('f', 16, struct pm_scan_arg), linux/fs.h
PAGE_IS_PFNZERO, PAGE_IS_HUGE = 1 << 5, 1 << 6
REGIONS = 4096
REGION, ARGUMENT = struct.Struct("3Q"), struct.Struct("12Q")


def scan(pid, blocks, category):
    """The ranges of addresses in the blocks that are of this category."""
    regions = ctypes.create_string_buffer(REGION.size * REGIONS)
    with open(f"/proc/{pid}/pagemap", "rb") as pagemap:
        for start, end in blocks:
            while start < end:
                argument = bytearray(ARGUMENT.pack(ARGUMENT.size, 0, start, end, 0,
                                                   ctypes.addressof(regions), REGIONS, 0, 0, category, 0,
                                                   category))
                count = fcntl.ioctl(pagemap, PAGEMAP_SCAN, argument)
                for low, high, _ in itertools.islice(REGION.iter_unpack(regions.raw), count):
                    yield low, high
                start = ARGUMENT.unpack(argument)[4]  # how far it came


def huge_pages(pid, blocks):
    """The addresses of all huge pages in the blocks."""
    return {at for low, high in scan(pid, blocks, PAGE_IS_HUGE) for at in range(low, high, HUGE)}


def zero_page_users(pid, blocks):
    """How many pages of the blocks are the kernel's one page of zeros."""
    return sum(high - low for low, high in scan(pid, blocks, PAGE_IS_PFNZERO)) // PAGE


def hot_pieces(blocks, first, second, share):
    """Addresses of the 2 MiB pieces of which at least `share` of the pages differ in two dumps."""
    hot = set()
    with open(first.path, "rb") as one, open(second.path, "rb") as other:
        for start, end in blocks:
            for at in range(start, end, HUGE):
                pairs = zip(_pages(one), _pages(other))
                if sum(a != b for a, b in pairs) >= share * HUGE // PAGE:
                    hot.add(at)
    return hot


def _pages(file):
    data = file.read(HUGE)
    return [data[at:at + PAGE] for at in range(0, len(data), PAGE)]
