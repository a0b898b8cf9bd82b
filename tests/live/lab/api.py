# SPDX-License-Identifier: Apache-2.0
"""memd's control socket: HTTP/1.1 and JSON on a unix socket."""
import http.client
import json
import socket


class _Connection(http.client.HTTPConnection):
    def __init__(self, path, timeout):
        super().__init__("memd", timeout=timeout)
        self._path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def request(path, method, target, body=None, timeout=60):
    """(HTTP status, decoded JSON, or text when it is none). OSError when nobody listens."""
    connection = _Connection(path, timeout)
    try:
        payload = None if body is None else json.dumps(body)
        connection.request(method, target, payload, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode()
    finally:
        connection.close()
    try:
        return answer.status, json.loads(text)
    except ValueError:
        return answer.status, text
