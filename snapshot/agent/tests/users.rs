//! Who may read and write the host's cache: a clone nothing that another reads, another user nothing at all.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod wire;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::thread;

use runnel_agent::agent::{Agent, AgentError, PagesError};
use runnel_snapshot::protocol::{self, Adopt, ConnectError, PROTOCOL_VERSION};
use runnel_snapshot::volume::VolumeName;
use rustix::fs::{FallocateFlags, Gid, MemfdFlags, SealFlags, Uid};
use rustix::mm::{MapFlags, ProtFlags};
use rustix::thread::{set_thread_res_gid, set_thread_res_uid};
use wire::fixture::{self, CHUNK, chunk_of};
use wire::host::Home;
use wire::{Stored, serve};

/// Nobody's, as a user and as a group.
const OTHER: u32 = 65534;

fn is_root() -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    assert!(
        std::env::var_os("RUNNEL_LAB").is_none_or(|lab| lab != "full"),
        "other users need root to be tested"
    );
    let skipped = b"skipped: other users need root to be tested\n";
    io::stderr().write_all(skipped).unwrap(); // past the test harness, which keeps back what is printed
    false
}

/// Does something as another user, in a thread that ends with it: on Linux a thread has its own user.
fn as_another<T: Send>(act: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let other = scope.spawn(|| {
            let (gid, uid) = (Gid::from_raw(OTHER), Uid::from_raw(OTHER));
            set_thread_res_gid(gid, gid, gid).unwrap();
            set_thread_res_uid(uid, uid, uid).unwrap();
            act()
        });
        other.join().unwrap()
    })
}

/// Everything by which somebody who has been given `file` could write to it.
fn attempts(file: &File) -> Vec<(&'static str, io::Result<()>)> {
    let map = || {
        // SAFETY: a new mapping where the kernel finds room, of which nothing is used.
        let mapped = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                CHUNK,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                0,
            )
        };
        mapped.map(drop)
    };
    let read_only_then_write = || {
        // SAFETY: as above.
        let mapped = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                CHUNK,
                ProtFlags::READ,
                MapFlags::SHARED,
                file,
                0,
            )
        }?;
        let flags = rustix::mm::MprotectFlags::READ | rustix::mm::MprotectFlags::WRITE;
        // SAFETY: the mapping is this function's alone.
        unsafe { rustix::mm::mprotect(mapped, CHUNK, flags) }
    };
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let again = format!("/proc/self/fd/{}", file.as_raw_fd());
    let reopen = |options: &mut OpenOptions| options.open(&again).map(drop);
    vec![
        ("write", (&*file).write_all(b"x")),
        ("pwrite", file.write_all_at(b"x", 0)),
        ("ftruncate", file.set_len(0)),
        (
            "fallocate",
            rustix::fs::fallocate(file, punch, 0, CHUNK as u64).map_err(Into::into),
        ),
        ("mmap", map().map_err(Into::into)),
        ("mprotect", read_only_then_write().map_err(Into::into)),
        ("open to write", reopen(OpenOptions::new().write(true))),
        (
            "open to read and write",
            reopen(OpenOptions::new().read(true).write(true)),
        ),
        ("open to append", reopen(OpenOptions::new().append(true))),
        (
            "open to truncate",
            reopen(OpenOptions::new().write(true).truncate(true)),
        ),
    ]
}

#[test]
fn a_clone_can_in_no_way_write_what_another_reads() {
    let stored = Stored::new();
    let server = serve(&[&stored.path()]);
    let home = Home::new();
    let _agent = home.start();
    let image = format!("http://{}/web", server.address());
    let (clone, other) = (home.machine(&image).unwrap(), home.machine(&image).unwrap());
    clone.ask(&[0, 3]);
    assert!(clone.answers(2).iter().all(|(_, answer)| answer.is_ok()));
    let file = clone.page_file();
    for (how, done) in attempts(&file) {
        assert!(done.is_err(), "{how}");
    }
    if rustix::process::geteuid().is_root() {
        // Whom no mode holds up; and not by changing that.
        let changed = file.set_permissions(fs::Permissions::from_mode(0o666));
        assert_eq!(changed.unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
        for (how, done) in as_another(|| attempts(&file)) {
            assert!(done.is_err(), "{how} as another user");
        }
    }
    assert!(other.has(0, 1) && other.has(3, 2));
}

#[test]
fn another_user_gets_neither_the_agent_nor_a_page_file() {
    if !is_root() {
        return;
    }
    let stored = Stored::new();
    let home = Home::new();
    let _agent = home.start();
    let machine = home.machine(stored.path().to_str().unwrap()).unwrap();
    machine.gets(0);
    // As if its folders lay where everybody goes.
    fs::set_permissions(home.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let page_file = home
        .path()
        .join("memory")
        .join(stored.manifest.digest.hex())
        .join("memory");
    as_another(|| {
        let refused = home
            .machine(stored.path().to_str().unwrap())
            .map(drop)
            .unwrap_err();
        let ConnectError::Connect { source, .. } = refused else {
            panic!("{refused}")
        };
        assert_eq!(source.kind(), io::ErrorKind::PermissionDenied);
        let opened = File::open(&page_file).unwrap_err();
        assert_eq!(opened.kind(), io::ErrorKind::PermissionDenied);
        // Nor does an agent of theirs go on with it.
        let mut settings = home.settings();
        settings.socket = home.path().join("theirs.sock");
        let theirs = Agent::start(settings).map(drop).unwrap_err();
        let AgentError::Pages(PagesError::Exposed { owner: 0, .. }) = theirs else {
            panic!("{theirs}")
        };
    });
    let mut bytes = vec![0; CHUNK];
    machine.page_file().read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, chunk_of(1));
}

#[test]
fn an_agent_of_another_user_takes_a_machines_file_and_reads_no_image_that_is_not_its_own() {
    if !is_root() {
        return;
    }
    let stored = Stored::new();
    let home = Home::new();
    std::os::unix::fs::chown(home.path(), Some(OTHER), Some(OTHER)).unwrap();
    // Its threads are that user's, and so are those that they start.
    let agent = as_another(|| home.start());
    let memory = frozen_memory(&stored);
    let hand_over = |place: &str| {
        let adopt = Adopt {
            protocol: PROTOCOL_VERSION,
            image: place.to_owned(),
            digest: stored.manifest.digest,
            volume: VolumeName::Memory,
            machine: "parent".to_owned(),
        };
        protocol::hand_over(&home.socket(), adopt, &memory, &|| false)
    };
    let refused = hand_over(stored.path().to_str().unwrap()).unwrap_err();
    let ConnectError::NotAdopted(reason) = refused else {
        panic!("{refused}")
    };
    assert!(reason.contains("ermission denied"), "{reason}");

    let server = serve(&[&stored.path()]);
    let url = format!("http://{}/web", server.address());
    hand_over(&url).unwrap();
    let clone = home.machine(&url).unwrap();
    clone.gets(0);
    assert!(clone.has(0, 1) && clone.has(3, 2));
    let file = clone.page_file();
    assert_eq!(
        file.metadata().unwrap().ino(),
        memory.metadata().unwrap().ino(),
        "the machine's own"
    );
    // It can be opened, and is sealed.
    let writes = || {
        let again = format!("/proc/self/fd/{}", file.as_raw_fd());
        attempts(&OpenOptions::new().read(true).write(true).open(again).unwrap())
    };
    for (how, done) in writes().into_iter().chain(as_another(writes)) {
        let is_opened = how.starts_with("open") && how != "open to truncate";
        assert!(done.is_err() || is_opened, "{how}");
    }
    assert!(clone.has(0, 1) && clone.has(3, 2));
    assert_eq!(agent.status().images[0].adopted.len(), 1);
}

/// The memory of the machine that an image was made of, as nobody can change it.
fn frozen_memory(image: &Stored) -> File {
    let bytes = fixture::read_volume(&image.open(), &VolumeName::Memory);
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file: File = rustix::fs::memfd_create("memory", flags).unwrap().into();
    file.write_all(&bytes).unwrap();
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW;
    rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    file
}

#[test]
fn an_agent_uses_no_folder_that_is_anothers_or_that_others_may_enter() {
    if !is_root() {
        return;
    }
    let home = Home::new();
    for name in ["memory", "drives"] {
        let folder = home.path().join(name);
        for (owner, mode) in [(OTHER, 0o700), (0, 0o770), (0, 0o701), (0, 0o704)] {
            fs::create_dir(&folder).unwrap();
            fs::set_permissions(&folder, fs::Permissions::from_mode(mode)).unwrap();
            std::os::unix::fs::chown(&folder, Some(owner), None).unwrap();
            let refused = Agent::start(home.settings()).map(drop).unwrap_err();
            let said = refused.to_string();
            assert!(
                matches!(refused, AgentError::Pages(PagesError::Exposed { .. })),
                "{said}"
            );
            assert!(said.contains(name) && said.contains("chmod 700"), "{said}");
            fs::remove_dir(&folder).unwrap();
        }
    }
    drop(home.start());
}
