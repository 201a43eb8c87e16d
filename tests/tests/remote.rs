//! A machine resumed from afar: `serve`, an agent, and a monitor that has neither image nor network.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::path::Path;

use runnel_tests::bare::tell;
use runnel_tests::served::Served;
use serde_json::json;

#[test]
fn two_machines_run_from_one_served_image_and_each_byte_crosses_once() {
    let served = Served::new();
    let _agent = served.agents().start(&[]);
    let resume = json!({"resume_vm": true});
    let mut machines = [served.load(&resume), served.load(&resume)];
    for machine in &mut machines {
        tell(machine, "count:1", "count=4");
        tell(machine, "checkfill:8m:4m:7", "checkfill=right");
        tell(machine, "fill:8m:4m:9", "fill=done");
        tell(machine, "checkfill:8m:4m:9", "checkfill=right");
    }
    let stored = bytes_in(&served.image().join("blobs/sha256"));
    let sent = served.bytes_sent();
    assert!(
        sent < stored + stored / 2,
        "{sent} bytes were sent of an image of {stored}"
    );
}

fn bytes_in(blobs: &Path) -> u64 {
    std::fs::read_dir(blobs)
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .sum()
}
