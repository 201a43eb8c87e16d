#!/usr/bin/python3
"""The demo's guest: counts, holds random bytes in memory and in files, and answers over HTTP.

  GET /                        a page for people
  GET /counter                 the counter, which rises ten times a second, as plain text
  GET /kernel                  the kernel's release
  GET /hash/memory             BLAKE2b of the bytes in this process's memory
  GET /hash/files              BLAKE2b of the bytes in the files
  GET /hash/files?drop_caches  the same, read from the disk again

`demo.mib=N` on the kernel's command line says how many MiB of each; 256 unless given.
The counter goes out on the serial console too, as `counter=N`; `demo=ready` says that all bytes are there.
"""

import hashlib
import http.server
import os
import pathlib
import threading
import time

MIB = 1 << 20
FILES = 16
FOLDER = pathlib.Path("/var/lib/demo")

counter = 0


def amount_mib():
    for word in pathlib.Path("/proc/cmdline").read_text().split():
        name, _, value = word.partition("=")
        if name == "demo.mib":
            return int(value)
    return 256


def count(console):
    global counter
    while True:
        counter += 1
        os.write(console, f"counter={counter}\n".encode())
        time.sleep(0.1)


def files():
    return sorted(FOLDER.glob("random-*"))


def hash_files(drop_caches):
    if drop_caches:
        os.sync()
        pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")
    digest = hashlib.blake2b()
    for path in files():
        with path.open("rb") as file:
            while piece := file.read(MIB):
                digest.update(piece)
    return digest.hexdigest()


PAGE = """<!doctype html>
<title>A machine that travels</title>
<h1>Hello from {host}</h1>
<p>The counter stands at <b>{counter}</b>. It is in this process's memory, and nowhere else.</p>
"""


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path, _, query = self.path.partition("?")
        kind = "text/plain"
        if path == "/":
            kind = "text/html"
            text = PAGE.format(host=os.uname().nodename, counter=counter)
        elif path == "/counter":
            text = str(counter)
        elif path == "/kernel":
            text = os.uname().release
        elif path == "/hash/memory":
            text = hashlib.blake2b(held).hexdigest()
        elif path == "/hash/files":
            text = hash_files(query == "drop_caches")
        else:
            return self.send_error(404)
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


# Not /dev/ttyS0: when getty takes the line it hangs up everyone who has that open.
console = os.open("/dev/console", os.O_WRONLY | os.O_NOCTTY)
threading.Thread(target=count, args=(console,), daemon=True).start()
held = bytearray()
amount = amount_mib()
for _ in range(amount):
    held += os.urandom(MIB)
FOLDER.mkdir(exist_ok=True)
for number in range(FILES):
    with (FOLDER / f"random-{number:02}").open("wb") as file:
        for _ in range(amount // FILES):
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())
server = http.server.ThreadingHTTPServer(("", 80), Page)
os.write(console, b"demo=ready\n")
server.serve_forever()
