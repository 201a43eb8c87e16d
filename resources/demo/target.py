#!/usr/bin/env python3
"""The demo's second host: resumes the machine straight from the first host, and watches it arrive.

Times count from the moment at which `runnel resume` is started; bytes are what this host's network interface has
received by then, read from the kernel's counter every few milliseconds.
"""

import atexit
import bisect
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import urllib.error

from common import Api, Console, Progress, get, hashes, make_tap, page_text, say

IMAGE_URL = sys.argv[1]
SOCKET = "/run/runnel/machines/demo/api.sock"
RECEIVED = pathlib.Path("/sys/class/net/lan0/statistics/rx_bytes")


class Meter:
    """The interface's counter over time."""

    def __init__(self):
        self.times, self.values = [], []
        self._sample()
        threading.Thread(target=self._run, daemon=True).start()

    def _sample(self):
        value = int(RECEIVED.read_text())
        self.times.append(time.monotonic())
        self.values.append(value)

    def _run(self):
        while True:
            time.sleep(0.005)
            self._sample()

    def bytes_at(self, moment):
        """Received up to `moment`, since the meter was made; the next sample after it, so never too few."""
        position = min(bisect.bisect_left(self.times, moment), len(self.values) - 1)
        return self.values[position] - self.values[0]


def show_what_is_known():
    """For a resume that went wrong: what the machine, the monitor and the agent say."""
    for path in ("/", "/snapshot/progress"):
        try:
            say(f"GET {path}: {Api(SOCKET).call('GET', path, timeout=5)}")
        except (OSError, SystemExit) as error:
            say(f"GET {path}: {error}")
    for log in sorted(pathlib.Path("/run/runnel").rglob("*.log")):
        say(f"the end of {log}:")
        for line in log.read_text(errors="replace").splitlines()[-20:]:
            say(f"  {line}")


def wait_for(what, seconds, attempt, pause=0.002):
    """Tries again and again until `attempt` gives something, and returns it with the moment at which it did."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if (result := attempt()) is not None:
                return result, time.monotonic()
        except (OSError, urllib.error.URLError):
            pass
        time.sleep(pause)
    sys.exit(f"{what} did not come within {seconds} s")


def is_running():
    return True if Api(SOCKET).call("GET", "/")["state"] == "Running" else None


def volumes():
    return Api(SOCKET).call("GET", "/snapshot/progress")["volumes"]


def look():
    shares = (f"{volume['volume']}: {100 * volume['bytes_resident'] / volume['bytes_total']:.0f} %" for volume in volumes())
    return "arrived: " + ", ".join(shares)


def is_resident():
    found = volumes()
    arrived = all(volume["bytes_resident"] >= volume["bytes_total"] for volume in found)
    return True if found and arrived else None


atexit.register(show_what_is_known)
make_tap()
meter = Meter()
say(f"runnel resume {IMAGE_URL}")
started = time.monotonic()
machine = subprocess.Popen(
    ["runnel", "resume", IMAGE_URL, "--name", "demo"],
    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=None,
)
console = Console(machine.stdout, show=False)
report = {}


def note(event, moment, bytes_name=None):
    report[f"{event}_ms"] = round((moment - started) * 1000, 1)
    text = f"{event.replace('_', ' ')} after {report[f'{event}_ms']:.0f} ms"
    if bytes_name:
        report[bytes_name] = meter.bytes_at(moment)
        text += f", {report[bytes_name] / (1 << 20):.1f} MiB received"
    say(text)


_, moment = wait_for("the first instruction", 120, is_running)
note("first_instruction", moment, "bytes_at_first_instruction")
console.wait_first_output(120)
counter, moment = wait_for("the web page", 120, lambda: get("/counter", 30))
note("first_guest_output", console.first_output)
note("first_response", moment, "bytes_at_first_response")
report["counter_after"] = int(counter)
say(f"the guest goes on counting: {counter}; its web page says: {page_text()}")
with Progress(look):
    _, moment = wait_for("the last page", 900, is_resident, pause=0.05)
note("resident", moment, "bytes_total")
say("hashing all the random bytes again, those in files past the guest's cache")
report["hashes"] = hashes("?drop_caches")
pathlib.Path("/host/report.json").write_text(json.dumps(report))
atexit.unregister(show_what_is_known)
os.kill(machine.pid, signal.SIGTERM)
machine.wait()
