# SPDX-License-Identifier: Apache-2.0
"""The harness itself: that a guest boots without memd, and that it would notice a wrong byte."""
import os
import struct

from lab import Failure, Lab, PAGE
from lab.suite import live_test


def ram_mapping(pid, size):
    """(start, end) of the VMM's mapping that is as large as the guest's RAM."""
    with open(f"/proc/{pid}/maps") as file:
        for line in file:
            start, end = (int(word, 16) for word in line.split()[0].split("-"))
            if end - start >= size:
                return start, end
    raise Failure("the VMM has no mapping of the RAM's size")


def is_filled_by_workload(page):
    """Its words follow from each other (next_word in tests/guest/workload.c)."""
    words = struct.unpack("<8Q", page[:64])
    return all((word * 6364136223846793005 + 1442695040888963407) % (1 << 64) == following
               for word, following in zip(words, words[1:]))


def a_workload_page(pid, start, end):
    """The address of a page that the workload filled."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for address in range(start + (end - start) // 2, end, PAGE):
            memory.seek(address)
            if is_filled_by_workload(memory.read(PAGE)):
                return address
    raise Failure("no page of the workload found")


@live_test()
def guest_boots_and_verifies_without_memd():
    with Lab() as lab:
        guest = lab.start_guest("plain", plain=True, common="32M", unique="8M", zero="8M", twin="8M",
                                mosaic="4M", churn="4M", hot="4M", duty=50)
        guest.wait_ready()
        guest.wait_rounds(20)
        guest.report()


@live_test()
def guest_notices_one_flipped_bit():
    with Lab() as lab:
        guest = lab.start_guest("flip", memory="192M", plain=True, unique="96M", duty=10)
        guest.wait_ready()
        guest.report()
        start, end = ram_mapping(guest.pid, 192 << 20)
        address = a_workload_page(guest.pid, start, end)
        descriptor = os.open(f"/proc/{guest.pid}/mem", os.O_RDWR)
        byte = os.pread(descriptor, 1, address + 1234)[0]
        os.pwrite(descriptor, bytes([byte ^ 1]), address + 1234)
        os.close(descriptor)
        try:
            guest.report()
        except Failure as failure:
            if "offset=1232" not in str(failure):
                raise
            return
        raise Failure("the guest verified memory that has a wrong bit")
