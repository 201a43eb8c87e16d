//! KVM: whether it may be used, can do what the monitor asks of it, and runs Linux. The monitor says it of itself
//! (`runnel-vmm --describe-host`).

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use serde::Deserialize;

use super::Finding;
use crate::program;

const DEVICE: &str = "/dev/kvm";

/// The most vCPUs of a machine.
const VCPUS_MAX: i32 = 32;

/// What the monitor says of this host's KVM: `runnel_vmm::kvm::Description`, which is not linked in here.
#[derive(Deserialize)]
struct Description {
    error: Option<String>,
    lacks: Vec<String>,
    guests: Option<String>,
    vcpus_max: i32,
    scales_tsc: bool,
}

pub(super) fn examine() -> Vec<Finding> {
    const CHECK: &str = "kvm";
    // Here rather than by the monitor: what to do depends on why.
    if let Err(error) = OpenOptions::new().read(true).write(true).open(DEVICE) {
        return vec![unusable(CHECK, &error, group().as_deref())];
    }
    let host = match ask_monitor() {
        Ok(host) => host,
        Err(reason) => {
            let found = format!("{DEVICE} can be opened; the monitor does not say more: {reason}");
            return vec![Finding::warning(
                CHECK,
                found,
                "see what is said of the monitor below",
            )];
        }
    };
    if !host.lacks.is_empty() {
        let found = format!("{DEVICE} lacks {}", host.lacks.join(", "));
        return vec![Finding::missing(CHECK, found, "use a newer kernel, 6.1 at least")];
    }
    if let Some(error) = host.error {
        return vec![Finding::missing(
            CHECK,
            error,
            "use a kernel's own KVM, 6.1 or newer",
        )];
    }
    let access = Finding::ok(
        CHECK,
        format!("{DEVICE} can be used and has all that the monitor needs"),
    );
    vec![access, guests(&host), vcpus(&host), tsc(&host)]
}

fn ask_monitor() -> Result<Description, String> {
    let monitor = program::monitor().map_err(|error| error.to_string())?;
    let output = Command::new(monitor).arg("--describe-host").output();
    let output = output.map_err(|error| error.to_string())?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{}: {}", output.status, said.trim()));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| format!("it is of another version: {error}"))
}

/// The group whose members may open the device, if there is one.
fn group() -> Option<String> {
    let device = fs::metadata(DEVICE).ok()?;
    let opens = device.mode() & 0o060 == 0o060 && device.gid() != 0;
    let groups = fs::read_to_string("/etc/group").ok()?;
    group_named(&groups, device.gid()).filter(|_| opens)
}

/// The name of a group, of the lines of `/etc/group` (group(5)).
fn group_named(groups: &str, number: u32) -> Option<String> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, found) = (fields.next()?, fields.nth(1)?);
        (found.parse() == Ok(number)).then(|| name.to_owned())
    })
}

fn unusable(check: &'static str, error: &io::Error, group: Option<&str>) -> Finding {
    let advice = match (error.kind(), group) {
        (io::ErrorKind::NotFound, _) => {
            "load the module (`modprobe kvm_intel` or `modprobe kvm_amd`), and switch virtualization on in the \
             firmware, or nested virtualization on if this is a virtual machine"
                .to_owned()
        }
        (io::ErrorKind::PermissionDenied, Some(group)) => {
            format!("join the group {group} (`usermod -aG {group} $USER`, then log in again), or run as root")
        }
        (io::ErrorKind::PermissionDenied, None) => {
            format!("have root let you (`setfacl -m u:$USER:rw {DEVICE}`), or run as root")
        }
        _ => "look at what the kernel says: `dmesg | grep -i kvm`".to_owned(),
    };
    Finding::missing(check, format!("{DEVICE} cannot be opened: {error}"), advice)
}

/// A KVM without hardware virtualization interprets guest code, and lacks instructions that every kernel needs.
fn guests(host: &Description) -> Finding {
    const CHECK: &str = "guests";
    match host.guests.as_deref() {
        Some("linux") => Finding::ok(CHECK, "Linux runs: a guest's instructions are the processor's"),
        _ => Finding::warning(
            CHECK,
            "this KVM interprets guest code and knows too little of it: Linux does not run on it",
            "use a host with VT-x or AMD-V, or nested virtualization switched on if this is a virtual machine",
        ),
    }
}

fn vcpus(host: &Description) -> Finding {
    let found = format!("machines of up to {} vCPUs", host.vcpus_max.clamp(0, VCPUS_MAX));
    if host.vcpus_max >= VCPUS_MAX {
        return Finding::ok("vcpus", found);
    }
    Finding::warning("vcpus", found, "larger machines need another kernel's KVM")
}

/// Whether a machine that was saved on a host with another TSC frequency runs here.
fn tsc(host: &Description) -> Finding {
    if host.scales_tsc {
        return Finding::ok("tsc", "the TSC's frequency can be scaled");
    }
    Finding::warning(
        "tsc",
        "the TSC's frequency cannot be scaled",
        "machines that were saved on hosts of another frequency are refused here: move them between hosts of one kind",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::doctor::Verdict;

    fn host(guests: &str) -> Description {
        Description {
            error: None,
            lacks: Vec::new(),
            guests: Some(guests.into()),
            vcpus_max: 64,
            scales_tsc: true,
        }
    }

    #[test]
    fn a_kvm_that_does_not_run_linux_is_warned_about() {
        assert_eq!(guests(&host("bare")).verdict, Verdict::Warning);
        assert_eq!(guests(&host("linux")).verdict, Verdict::Ok);
    }

    #[test]
    fn a_device_that_may_not_be_opened_says_how_to_get_access() {
        let advice = |kind: io::ErrorKind, group| unusable("kvm", &kind.into(), group).advice.unwrap();
        assert!(advice(io::ErrorKind::NotFound, None).contains("modprobe"));
        assert!(advice(io::ErrorKind::PermissionDenied, Some("virt")).contains("usermod -aG virt"));
        assert!(advice(io::ErrorKind::PermissionDenied, None).contains("setfacl"));
        let groups = "root:x:0:\nkvm:x:104:me,you\n";
        assert_eq!(group_named(groups, 104).as_deref(), Some("kvm"));
        assert_eq!(group_named(groups, 7), None);
    }
}
