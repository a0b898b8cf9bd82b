# SPDX-License-Identifier: Apache-2.0
"""Two network namespaces with a wire between them that can be cut: reset, silent, or silent one way."""
import itertools
import os
import subprocess

from .errors import Skip

_numbers = itertools.count(1)
NOBODY = "02:00:00:00:00:99"  # a hardware address that no interface has


def _run(*words):
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise Skip(f"no network namespaces here: {' '.join(words)}: {done.stdout.strip()}")
    return done.stdout


class Wire:
    """`names` are the two namespaces, `addresses` what they are known by to each other."""

    def __init__(self):
        tag = f"m{os.getpid() % 100000}x{next(_numbers)}"
        self.names = (f"{tag}a", f"{tag}b")
        self.addresses = ("10.99.0.1", "10.99.0.2")
        self._mac = []

    def __enter__(self):
        try:
            for name in self.names:
                _run("ip", "netns", "add", name)
            _run("ip", "link", "add", "wire", "netns", self.names[0], "type", "veth",
                 "peer", "name", "wire", "netns", self.names[1])
            for name, address in zip(self.names, self.addresses):
                _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "wire")
                _run("ip", "-n", name, "link", "set", "wire", "up")
                _run("ip", "-n", name, "link", "set", "lo", "up")
                self._mac.append(_run("nsenter", f"--net=/run/netns/{name}", "sh", "-c",
                                      "ip -o link show wire").split("link/ether ")[1].split()[0])
        except Skip:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)

    def silence(self, *ends):
        """What these ends (0, 1) send gets lost from now on. Nobody is told."""
        for end in ends:
            self._neighbour(end, NOBODY)

    def mend(self):
        for end in (0, 1):
            self._neighbour(end, self._mac[1 - end])

    def _neighbour(self, end, hardware):
        _run("ip", "-n", self.names[end], "neigh", "replace", self.addresses[1 - end], "lladdr", hardware,
             "dev", "wire", "nud", "permanent")

    def reset(self, end=0):
        """Every TCP connection of this end is reset."""
        _run("nsenter", f"--net=/run/netns/{self.names[end]}", "ss", "-H", "-K", "-t", "dst",
             self.addresses[1 - end])
