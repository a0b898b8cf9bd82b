# SPDX-License-Identifier: Apache-2.0
"""A link that can fall silent: connections to `port` go on to `target`, until silence()."""
import socket
import threading


class Relay:
    def __init__(self, target):
        self._target = target
        self._silent = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def silence(self):
        """From now on no byte goes through, and no connection ends."""
        self._silent.set()

    def close(self):
        for each in self._sockets:
            each.close()

    def _accept(self):
        while True:
            try:
                one = self._listener.accept()[0]
                other = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            for each in (one, other):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += [one, other]
            for ends in ((one, other), (other, one)):
                threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source, sink):
        try:
            while data := source.recv(1 << 18):
                if self._silent.is_set():
                    threading.Event().wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass
