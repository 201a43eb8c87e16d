//! The kernel, memory, limits and files of this host.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;

use runnel_snapshot::causes::with_causes;
use runnel_snapshot::protocol::is_answering;
use rustix::fs::{Access, access, statvfs};
use rustix::process::{Resource, getrlimit};

use super::Finding;
use crate::images::ImageStore;
use crate::program;
use crate::size;
use crate::state::StateFolder;

/// The oldest kernel on which every piece of paging was tried.
const KERNEL_MIN: (u32, u32) = (6, 1);

/// Descriptors that a machine of many drives and vCPUs opens, and an agent of many machines.
const OPEN_FILES_MIN: u64 = 4096;

/// What a tmpfs should hold at least: the memory of one modest machine.
const TMPFS_BYTES_MIN: u64 = 512 << 20;

/// What a disk should have left: one modest machine.
const DISK_BYTES_MIN: u64 = 1 << 30;

/// What should be left for a guest.
const MEMORY_BYTES_MIN: u64 = 512 << 20;

pub(super) fn kernel() -> Finding {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let found = format!("Linux {release}");
    match version_of(&release) {
        Some(version) if version >= KERNEL_MIN => Finding::ok("kernel", found),
        _ => Finding::missing(
            "kernel",
            found,
            format!("install Linux {}.{} or newer", KERNEL_MIN.0, KERNEL_MIN.1),
        ),
    }
}

fn version_of(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut next = || numbers.next()?.parse().ok();
    Some((next()?, next()?))
}

pub(super) fn tun() -> Finding {
    const DEVICE: &str = "/dev/net/tun";
    match OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(_) => Finding::ok("tap", format!("{DEVICE} can be used")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Finding::warning(
            "tap",
            format!("there is no {DEVICE}: machines have no network"),
            "load the module: `modprobe tun`",
        ),
        Err(error) => Finding::warning(
            "tap",
            format!("{DEVICE} cannot be opened ({error}): machines have no network"),
            "run as root, or have root make the tap for you: `ip tuntap add tap0 mode tap user $USER`",
        ),
    }
}

pub(super) fn programs() -> Finding {
    match program::monitor() {
        Ok(path) => Finding::ok("monitor", path.display().to_string()),
        Err(error) => Finding::missing(
            "monitor",
            error.to_string(),
            "`make build` puts all programs into target/release",
        ),
    }
}

pub(super) fn state_folder() -> Finding {
    match StateFolder::open().and_then(|state| Ok((state.machines()?.len(), state))) {
        Ok((machines, state)) => Finding::ok(
            "state",
            format!("{}, {machines} machines run", state.path().display()),
        ),
        Err(error) => Finding::missing(
            "state",
            with_causes(&error),
            "machines are remembered there: see to it that it can be written",
        ),
    }
}

pub(super) fn agent() -> Finding {
    match StateFolder::open().map(|state| state.agent_socket()) {
        Ok(socket) if is_answering(&socket) => {
            Finding::ok("agent", format!("answers at {}", socket.display()))
        }
        // `resume` needs one only for images of other hosts.
        _ => Finding::ok("agent", "none runs"),
    }
}

pub(super) fn memory() -> Finding {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let Some(available) = meminfo(&text, "MemAvailable") else {
        return Finding::warning("memory", "/proc/meminfo says nothing", "mount /proc");
    };
    let found = format!("{} available", size::bytes(available));
    if available >= MEMORY_BYTES_MIN {
        return Finding::ok("memory", found);
    }
    Finding::warning("memory", found, "end something else, or run small machines")
}

/// A line of `/proc/meminfo` in bytes.
fn meminfo(text: &str, name: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

pub(super) fn tmpfs() -> Finding {
    const PATH: &str = "/dev/shm";
    let Ok(found) = statvfs(PATH) else {
        return Finding::warning(
            "tmpfs",
            format!("{PATH} is not there: machines resumed through the agent have no place for memory"),
            format!("mount one: `mount -t tmpfs tmpfs {PATH}`"),
        );
    };
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    let text = format!(
        "{PATH} has {} free for the memory of resumed machines",
        size::bytes(free)
    );
    if free >= TMPFS_BYTES_MIN {
        return Finding::ok("tmpfs", text);
    }
    Finding::warning(
        "tmpfs",
        text,
        format!("make it larger: `mount -o remount,size=75% {PATH}`"),
    )
}

pub(super) fn image_store() -> Finding {
    const CHECK: &str = "images";
    const ADVICE: &str = "set RUNNEL_IMAGES to a directory of yours on a disk with room";
    match ImageStore::of_this_user() {
        Ok(store) => room(CHECK, store.path(), "the images of snapshots", ADVICE),
        Err(error) => Finding::warning(CHECK, error.to_string(), ADVICE),
    }
}

pub(super) fn overlays() -> Finding {
    room(
        "overlays",
        &std::env::temp_dir(),
        "what resumed machines write to their drives",
        "set TMPDIR to a directory of yours on a disk with room, or give `runnel resume` an --overlay-directory",
    )
}

/// Whether something can be kept in a folder, which need not be there: then in the one that it would be made in.
fn room(check: &'static str, folder: &Path, what: &str, advice: &str) -> Finding {
    let Some(there) = folder.ancestors().find(|path| path.exists()) else {
        return Finding::warning(check, format!("there is no {}", folder.display()), advice);
    };
    let folder = folder.display();
    if let Err(error) = access(there, Access::WRITE_OK | Access::EXEC_OK) {
        let found = format!("{folder} cannot be written ({error}): {what} have no place");
        return Finding::warning(check, found, advice);
    }
    let free = statvfs(there).map_or(0, |found| found.f_bavail.saturating_mul(found.f_frsize));
    let found = format!("{folder} has {} free for {what}", size::bytes(free));
    if free >= DISK_BYTES_MIN {
        return Finding::ok(check, found);
    }
    Finding::warning(check, found, advice)
}

pub(super) fn huge_pages() -> Finding {
    let text = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    let chosen = text.split(['[', ']']).nth(1).unwrap_or("unknown");
    let found = format!("transparent huge pages of shared memory: {chosen}");
    if matches!(chosen, "always" | "force") {
        let advice = "one touched page may then cost 2 MiB: `echo advise > \
                      /sys/kernel/mm/transparent_hugepage/shmem_enabled`";
        return Finding::warning("huge pages", found, advice);
    }
    Finding::ok("huge pages", found)
}

pub(super) fn open_files() -> Finding {
    let limit = getrlimit(Resource::Nofile);
    // No limit is the largest.
    let (now, most) = (
        limit.current.unwrap_or(u64::MAX),
        limit.maximum.unwrap_or(u64::MAX),
    );
    let found = format!("{now} open files, up to {most}");
    if most >= OPEN_FILES_MIN {
        return Finding::ok("open files", found);
    }
    let advice = format!(
        "allow {OPEN_FILES_MIN}: `ulimit -Hn {OPEN_FILES_MIN}` as root, or /etc/security/limits.conf"
    );
    Finding::warning("open files", found, advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_by_number() {
        assert_eq!(version_of("6.1.0-18-cloud-amd64"), Some((6, 1)));
        assert_eq!(version_of("10.0-rc1"), Some((10, 0)));
        assert_eq!(version_of("unknown"), None);
        assert!(version_of("5.19.7") < Some(KERNEL_MIN));
    }

    #[test]
    fn a_folder_that_is_still_to_be_made_has_the_room_of_the_one_around_it() {
        use crate::commands::doctor::Verdict;
        let folder = tempfile::tempdir().unwrap();
        let found = room("images", &folder.path().join("a/b"), "images", "make room");
        assert!(
            found.found.contains("a/b has") && found.found.contains("free for images"),
            "{found:?}"
        );
        // Nobody makes a folder in a file, not even root.
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let found = room("images", &file.join("b"), "images", "make room");
        assert_eq!(found.verdict, Verdict::Warning, "{found:?}");
    }

    #[test]
    fn memory_is_read_in_bytes() {
        let text = "MemTotal:  100 kB\nMemAvailable:     2048 kB\n";
        assert_eq!(meminfo(text, "MemAvailable"), Some(2 << 20));
        assert_eq!(meminfo(text, "Mem"), None);
        assert_eq!(meminfo("", "MemAvailable"), None);
    }
}
