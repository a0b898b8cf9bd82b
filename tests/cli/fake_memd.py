#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Stands in for memd where the real one can't produce an answer at will.

usage: fake_memd.py SOCKET LOG ANSWERS

ANSWERS is a JSON object: "METHOD /path" -> [status, body]; a body that is a list is a stream of
lines, after which the connection closes. Each request is appended to LOG as one line of JSON.
Prints "ready" when it listens.
"""
import json
import os
import socketserver
import sys
from http.server import BaseHTTPRequestHandler

path, log, answers = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length).decode()
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps([self.command, self.path, json.loads(body or "null")]) + "\n")
        status, content = answers.get(
            f"{self.command} {self.path}", [404, {"error": "there is no such thing"}])
        if isinstance(content, list):
            self.stream(status, content)
            return
        data = b"" if content is None else (
            content.encode() if isinstance(content, str) else json.dumps(content).encode())
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, status, lines):
        self.send_response(status)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in lines:
            data = line.encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.write(b"0\r\n\r\n")

    do_GET = do_POST = do_PATCH = do_DELETE = answer

    def log_message(self, *args):
        pass


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

    def get_request(self):
        request, _ = super().get_request()
        return request, ("memctl", 0)


if os.path.exists(path):
    os.unlink(path)
with Server(path, Handler) as server:
    print("ready", flush=True)
    server.serve_forever()
