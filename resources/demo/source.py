#!/usr/bin/env python3
"""The demo's first host: boots the guest through the API, lets it work, and makes an image of it while it runs."""

import json
import os
import pathlib
import subprocess
import time

from common import Api, Console, Progress, get, hashes, make_tap, mib, page_text, run, say

HOST = pathlib.Path("/host")
IMAGE = HOST / "image"
SOCKET = "/run/demo.socket"
MEMORY_MIB = 512
RANDOM_MIB = int(os.environ.get("DEMO_MIB", "256"))


def boot():
    run("cp", "--sparse=always", "/programs/guest/disk.ext4", str(HOST / "disk.ext4"))
    say("booting Debian through the API: 512 MiB of RAM, a disk of 2 GiB")
    monitor = subprocess.Popen(
        ["runnel-vmm", "--api-sock", SOCKET, "--id", "demo"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    while not os.path.exists(SOCKET):
        if monitor.poll() is not None:
            raise SystemExit(f"runnel-vmm ended with {monitor.returncode}")
        time.sleep(0.01)
    api = Api(SOCKET)
    api.call("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": MEMORY_MIB})
    api.call("PUT", "/boot-source", {
        "kernel_image_path": "/programs/guest/vmlinuz",
        "initrd_path": "/programs/guest/initrd",
        "boot_args": f"console=ttyS0 root=/dev/vda panic=-1 demo.mib={RANDOM_MIB}",
    })
    api.call("PUT", "/drives/root", {
        "drive_id": "root", "path_on_host": str(HOST / "disk.ext4"), "is_root_device": False, "is_read_only": False,
    })
    api.call("PUT", "/network-interfaces/eth0", {"iface_id": "eth0", "host_dev_name": "tap0"})
    api.call("PUT", "/entropy", {})
    api.call("PUT", "/actions", {"action_type": "InstanceStart"})
    return monitor, api


def snapshot(api):
    """Saves the machine, which stands still for the while and runs on afterwards; returns the image's size."""

    def look():
        operation = api.call("GET", "/snapshot/progress")["operation"]
        if operation and operation["kind"] == "create":
            return f"{operation['phase']}: {mib(operation['bytes_done'])} of {mib(operation['bytes_total'])}"

    say("making an image of it while it runs")
    started = time.monotonic()
    with Progress(look):
        api.call("PUT", "/snapshot/create", {"image_path": str(IMAGE)})
    size = sum(file.stat().st_size for file in IMAGE.rglob("*") if file.is_file())
    say(f"the image is complete after {time.monotonic() - started:.1f} s: {mib(size)}")
    return size


make_tap()
monitor, api = boot()
console = Console(monitor.stdout)
console.wait_ready(600)
say(f"its web page answers: {page_text()}")
say("hashing all its random bytes")
facts = {
    "hashes": hashes(),
    "guest_kernel": get("/kernel"),
    "ram_bytes": MEMORY_MIB << 20,
    "disk_bytes": (HOST / "disk.ext4").stat().st_size,
}
facts["counter_before"] = int(get("/counter"))
say(f"it has counted to {facts['counter_before']}, and holds {RANDOM_MIB} MiB of random bytes in memory and as much in files")
facts["image_bytes"] = snapshot(api)
say(f"the machine runs on here; it counts: {get('/counter')}")
(HOST / "facts.json").write_text(json.dumps(facts))
monitor.kill()
monitor.wait()
say("and now it has ended here; the image is all that is left")
