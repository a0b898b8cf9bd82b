# SPDX-License-Identifier: Apache-2.0
"""A laboratory for memd: a daemon of one's own, real QEMU guests under it, and what the kernel
says about both. Used by the live tests and by ./quickstart.

    with Lab() as lab:
        lab.start_memd(domains={"d": [0]})
        a = lab.start_guest("a", domain="d", common="64M")
        a.wait_ready()
        ...
        a.report()            # the guest verifies all its memory now; raises if a byte is wrong

Whatever was started is gone when the block is left, however it is left.
"""
from .lab import Lab, Failure, Skip, wait_for
from .machine import accelerator, PAGE

__all__ = ["Lab", "Failure", "Skip", "wait_for", "accelerator", "PAGE"]
