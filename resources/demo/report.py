#!/usr/bin/env python3
"""report.py FACTS REPORT OUT: joins what both hosts found into OUT, prints it as a table, and fails unless the machine
that arrived is the one that left."""

import json
import os
import pathlib
import sys

facts_path, report_path, out = map(pathlib.Path, sys.argv[1:])
facts, report = json.loads(facts_path.read_text()), json.loads(report_path.read_text())
before, after = facts.pop("hashes"), report.pop("hashes")
report |= facts
report["checksums_match"] = before == after
report["lab_level"] = os.environ.get("DEMO_LEVEL", "nested")
out.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")


def mib(name):
    return f"{report[name] / (1 << 20):,.1f} MiB"


def ms(name):
    return f"{report[name]:,.0f} ms"


rows = [
    ("guest", f"Debian, Linux {report['guest_kernel']}, {mib('ram_bytes')} RAM, {mib('disk_bytes')} disk"),
    ("image", f"{mib('image_bytes')}, compressed"),
    ("first instruction", f"{ms('first_instruction_ms')}, {mib('bytes_at_first_instruction')} received"),
    ("first output of the guest", ms("first_guest_output_ms")),
    ("first web page", f"{ms('first_response_ms')}, {mib('bytes_at_first_response')} received"),
    ("fully resident", f"{ms('resident_ms')}, {mib('bytes_total')} received"),
    ("counter", f"{report['counter_before']} there, {report['counter_after']} here"),
    ("random bytes", "the same, in memory and on disk" if before == after else "DIFFER"),
]
width = max(len(name) for name, _ in rows)
print()
for name, value in rows:
    print(f"  {name:<{width}}  {value}")
print()
if before != after:
    sys.exit("the random bytes that arrived are not those that left")
if not report["counter_before"] < report["counter_after"]:
    sys.exit("the counter did not go on from where it was")
