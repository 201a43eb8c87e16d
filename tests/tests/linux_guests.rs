//! Unmodified Debian kernels under Runnel.

use std::process::ExitCode;
use std::time::Duration;

use runnel_tests::lab::suite::Suite;
use runnel_tests::lab::{Level, level};

fn main() -> ExitCode {
    Suite {
        host_kernels: &["6.12-cloud", "6.1-cloud"],
        memory_mib: 3072,
        deadline: Duration::from_secs(600),
        programs: &[],
        things: &[
            "kernel/6.1-cloud",
            "kernel/6.12-cloud",
            "guest/6.1-cloud",
            "guest/6.12-cloud",
        ],
        tests: &[("kvm_runs_what_linux_needs", kvm_runs_what_linux_needs)],
    }
    .main()
}

fn kvm_runs_what_linux_needs() {
    assert_eq!(level::of_this_machine(), Level::Linux);
}
