"""What both hosts of the demo use: a monitor's API, a guest's console, its web page, and what is shown."""

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request

GUEST = "http://172.30.0.2"
HOST_NAME = os.uname().nodename


def say(text):
    print(f"{HOST_NAME:>6} | {text}", flush=True)


def run(*command):
    subprocess.run(command, check=True)


def make_tap():
    """The guest's network: a tap of this host's, which the guest knows as its gateway."""
    run("ip", "tuntap", "add", "dev", "tap0", "mode", "tap")
    run("ip", "address", "add", "172.30.0.1/24", "dev", "tap0")
    run("ip", "link", "set", "tap0", "up")


class Api:
    """Firecracker's API on the monitor's unix socket."""

    def __init__(self, path):
        self.path = path

    def call(self, method, path, body=None, timeout=600):
        connection = http.client.HTTPConnection("localhost", timeout=timeout)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(timeout)
        connection.sock.connect(self.path)
        connection.request(method, path, None if body is None else json.dumps(body))
        response = connection.getresponse()
        text = response.read()
        connection.close()
        if response.status >= 300:
            sys.exit(f"{method} {path} was answered with {response.status}: {text.decode(errors='replace')}")
        return json.loads(text) if text else None


class Progress:
    """Shows how far something is, every few seconds, while the block runs; `look` returns a text, or None."""

    EVERY_SECONDS = 5

    def __init__(self, look):
        self._look = look
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *_):
        self._is_over.set()
        self._thread.join()

    def _run(self):
        while not self._is_over.wait(self.EVERY_SECONDS):
            try:
                if text := self._look():
                    say(f"  {text}")
            except OSError:
                pass  # it has just ended


class Console:
    """What a guest writes on its serial port, read by a thread from a pipe; shown but for the counter's lines."""

    def __init__(self, pipe, show=True):
        self.first_output = None  # time.monotonic() of the first byte
        self.counter = None
        self._ready = threading.Event()
        self._first = threading.Event()
        threading.Thread(target=self._read, args=(pipe, show), daemon=True).start()

    def _read(self, pipe, show):
        last_said = time.monotonic()
        line = b""
        while piece := os.read(pipe.fileno(), 65536):
            if self.first_output is None:
                self.first_output = time.monotonic()
                self._first.set()
            *lines, line = (line + piece).split(b"\n")
            for text in (one.decode(errors="replace").strip() for one in lines):
                # The kernel's own messages may stand on the same line.
                if counted := re.match(r"counter=(\d+)", text):
                    self.counter = int(counted[1])
                    if time.monotonic() - last_said > 5:
                        last_said = time.monotonic()
                        say(f"the guest counts: {self.counter}")
                elif text == "demo=ready":
                    self._ready.set()
                elif show and text:
                    last_said = time.monotonic()
                    say(f"  {text}")

    def wait_ready(self, seconds):
        if not self._ready.wait(seconds):
            sys.exit(f"the guest was not ready within {seconds} s")

    def wait_first_output(self, seconds):
        if not self._first.wait(seconds):
            sys.exit(f"the guest wrote nothing within {seconds} s")


def mib(number):
    return f"{number / (1 << 20):,.0f} MiB"


def get(path, seconds=600):
    """Asks the guest's web server, once."""
    with urllib.request.urlopen(GUEST + path, timeout=seconds) as response:
        return response.read().decode().strip()


def page_text():
    """The guest's page as one reads it."""
    body = get("/").partition("</title>")[2]
    return " ".join(re.sub(r"<[^>]*>", "", body).split())


def hashes(query=""):
    return {"memory": get("/hash/memory"), "files": get("/hash/files" + query)}
