# SPDX-License-Identifier: Apache-2.0
"""What sharing takes besides the pages that it shares. Bytes.

An agent's user memory is what its VMM has more than a VMM without memd: anonymous memory outside
guest RAM and the shadows, plus the ring (shared memory, counted once). The same QEMU with the same
guest is stable in that to some 20 KiB, since its code buffer is one huge mapping that is there from
the first moment. memd's is its private anonymous memory. The store's pages count nowhere: they are
what the guests had before. The agent's tables, which grow with its guest, are counted by themselves
too (`table_bytes`)."""
import statistics

from lab import PAGE

from .procs import page_table_bytes, smaps

VMA_BYTES = 200  # struct vm_area_struct with its part of the tree
STORE, RING = "/memfd:memd-store", "/memfd:memd-ring"
# How the agent maps its tables (memd/pages/ram.c); QEMU maps nothing so.
TABLE_FLAGS = {"nr", "dd", "nh"}
SHADOW_FLAG = "um"  # userfaultfd, missing pages


def anonymous(vmas):
    return sum(vma.sizes["Anonymous"] for vma in vmas)


def of_vmm(guest):
    """What its VMM has outside guest RAM, and its mappings and page tables altogether."""
    vmas = smaps(guest.pid)
    outside = [vma for vma in vmas if not vma.lies_in(guest.blocks) and SHADOW_FLAG not in vma.flags
               and not vma.path.startswith(STORE)]
    tables = [vma for vma in outside if TABLE_FLAGS <= vma.flags]
    return {"anonymous_bytes": anonymous(outside), "table_bytes": anonymous(tables),
            "ring_bytes": sum(vma.sizes["Rss"] for vma in vmas if vma.path.startswith(RING)),
            "vmas": len(vmas), "store_vmas": sum(vma.path.startswith(STORE) for vma in vmas),
            "page_table_bytes": page_table_bytes(guest.pid)}


def medians(guests):
    """Of each of these, the median over the guests."""
    each = [of_vmm(guest) for guest in guests]
    return {name: statistics.median(one[name] for one in each) for name in each[0]}


def watched_pages(fleet):
    return sum(end - start for guest in fleet.guests for start, end in guest.blocks) // PAGE


def of_daemon(vmas):
    return anonymous(vma for vma in vmas if "/memfd:" not in vma.path)


def memd_memory(fleet):
    return {"pages": watched_pages(fleet), "guests": len(fleet.guests), **medians(fleet.guests),
            "daemon_bytes": of_daemon(smaps(fleet.lab.memd.pid)), "alone_bytes": of_daemon(fleet.alone)}


def ksmd_memory(fleet):
    return {"pages": watched_pages(fleet), "guests": len(fleet.guests), **medians(fleet.guests),
            "kernel_bytes": fleet.ksmd.metadata_bytes(fleet.pids())}


def per_page(memd, ksmd, plain):
    """All of it by watched page. `plain` is a fleet's VMMs before any engine ran. What does not grow
    with a guest (memd without guests, and each agent's ring, threads, library and monitor) is in
    memd_bytes and, once more, in memd_fixed_bytes."""
    share = memd["guests"] / memd["pages"]
    agent = memd["anonymous_bytes"] - ksmd["anonymous_bytes"] + memd["ring_bytes"]
    return {
        "memd_bytes": memd["daemon_bytes"] / memd["pages"] + agent * share,
        "memd_fixed_bytes": memd["alone_bytes"] / memd["pages"] + (agent - memd["table_bytes"]) * share,
        "memd_daemon_bytes": memd["daemon_bytes"] / memd["pages"],
        "memd_agent_bytes": agent * share,
        "memd_ring_bytes": memd["ring_bytes"] * share,
        "memd_vma_bytes": (memd["vmas"] - plain["vmas"]) * VMA_BYTES * share,
        "memd_page_table_bytes": (memd["page_table_bytes"] - plain["page_table_bytes"]) * share,
        "ksmd_bytes": ksmd["kernel_bytes"] / ksmd["pages"],
        "ksmd_vma_bytes": (ksmd["vmas"] - plain["vmas"]) * VMA_BYTES * share,
        "ksmd_page_table_bytes": (ksmd["page_table_bytes"] - plain["page_table_bytes"]) * share,
    }
