//! Files that monitors hand to the agent, as the memory of an image: taken if nobody can change them and they are right,
//! and else refused, as if there had been none.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod wire;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use runnel_agent::agent::{Agent, AgentSettings};
use runnel_snapshot::protocol::{self, Adopt, AdoptedVolume, ConnectError, PROTOCOL_VERSION};
use runnel_snapshot::source::Arrived::{Data, Zero};
use runnel_snapshot::volume::VolumeName;
use rustix::fs::{MemfdFlags, SealFlags, SeekFrom};
use wire::Stored;
use wire::fixture::Part::{self, Zeros};
use wire::fixture::{CHUNK, chunk_of};
use wire::host::{Home, LONG, Machine, registry_of};
use wire::program::Program;
use wire::scripted::Reply;

const ALL: SealFlags = SealFlags::WRITE.union(SealFlags::SHRINK).union(SealFlags::GROW);

const PAGE: usize = 4096;

/// A chunk of which only the second page is not zeros: a machine's memory has holes around it.
fn sparse_chunk() -> Vec<u8> {
    let mut chunk = vec![0; CHUNK];
    chunk[PAGE..2 * PAGE].copy_from_slice(&chunk_of(5)[..PAGE]);
    chunk
}

/// An image whose memory is data, zeros, zeros, data, and data that is mostly zeros.
fn image() -> Stored {
    let parts = [chunk_of(1), chunk_of(2), sparse_chunk()].map(Part::Data);
    let [first, second, third] = parts;
    Stored::of(&[first, Zeros(2), second, third])
}

/// The memory of the machine that [`image`] was made of, before it is sealed.
fn memory() -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file: File = rustix::fs::memfd_create("memory", flags).unwrap().into();
    file.set_len(5 * CHUNK as u64).unwrap();
    file.write_all_at(&chunk_of(1), 0).unwrap();
    // Zeros that were written.
    file.write_all_at(&[0; PAGE], CHUNK as u64).unwrap();
    file.write_all_at(&chunk_of(2), 3 * CHUNK as u64).unwrap();
    let (start, page) = (4 * CHUNK + PAGE, &sparse_chunk()[PAGE..2 * PAGE]);
    file.write_all_at(page, start as u64).unwrap();
    file
}

fn sealed(file: File, seals: SealFlags) -> File {
    rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    file
}

fn offer(home: &Home, image: &Stored, file: &File) -> Result<(), ConnectError> {
    offer_at(home, image.path().to_str().unwrap(), image, file)
}

/// Of an image that the agent is to read there.
fn offer_at(home: &Home, place: &str, image: &Stored, file: &File) -> Result<(), ConnectError> {
    let adopt = Adopt {
        protocol: PROTOCOL_VERSION,
        image: place.to_owned(),
        digest: image.manifest.digest,
        volume: VolumeName::Memory,
        machine: "parent".to_owned(),
    };
    protocol::hand_over(&home.socket(), adopt, file, &|| false)
}

#[track_caller]
fn refusal(offered: Result<(), ConnectError>) -> String {
    match offered.unwrap_err() {
        ConnectError::NotAdopted(reason) => reason,
        other => panic!("{other}"),
    }
}

fn clone_of(home: &Home, image: &Stored) -> Machine {
    home.machine(image.path().to_str().unwrap()).unwrap()
}

/// All of its memory, once the agent has answered for all of it.
fn memory_of(machine: &Machine) -> Vec<u8> {
    machine.ask(&[0, 1, 2, 3, 4]);
    let answers = [(0, Data), (1, Zero), (2, Zero), (3, Data), (4, Data)];
    assert_eq!(machine.answers(5), answers.map(|(chunk, what)| (chunk, Ok(what))));
    let mut bytes = vec![1; 5 * CHUNK];
    machine.page_file().read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn right() -> Vec<u8> {
    [chunk_of(1), vec![0; 2 * CHUNK], chunk_of(2), sparse_chunk()].concat()
}

#[test]
fn clones_map_the_file_of_the_machine_that_they_are_of() {
    let image = image();
    let home = Home::new();
    let _agent = home.start();
    let file = sealed(memory(), ALL);
    offer(&home, &image, &file).unwrap();
    for clone in [clone_of(&home, &image), clone_of(&home, &image)] {
        assert!(memory_of(&clone) == right());
        let pages = clone.page_file();
        assert_eq!(pages.metadata().unwrap().ino(), file.metadata().unwrap().ino());
        assert!(pages.write_at(b"x", 0).is_err());
        // What the machine never touched can be mapped all the same.
        let hole = rustix::fs::seek(&*pages, SeekFrom::Hole(3 * CHUNK as u64)).unwrap();
        assert_eq!(hole, 5 * CHUNK as u64);
    }
    let status = protocol::status(&home.socket(), LONG).unwrap();
    assert_eq!(status.cache.memory.bytes, 0, "it takes nothing of the quota");
    let [its] = &status.images[..] else { panic!() };
    let adopted = AdoptedVolume {
        volume: VolumeName::Memory,
        bytes: file.metadata().unwrap().blocks() * 512,
    };
    assert_eq!((its.bytes_kept, &its.adopted), (0, &vec![adopted]));
}

#[test]
fn what_can_be_changed_or_is_something_else_is_refused_and_clones_are_right_anyway() {
    let image = image();
    let wrong = |at: usize, seals| {
        let file = memory();
        file.write_all_at(b"!", at as u64).unwrap();
        sealed(file, seals)
    };
    let longer = memory();
    longer.set_len(6 * CHUNK as u64).unwrap();
    let shorter = memory();
    shorter.set_len(4 * CHUNK as u64).unwrap();
    let on_disk = tempfile::tempfile().unwrap();
    on_disk.write_all_at(&right(), 0).unwrap();
    let lies = [
        (memory(), "sealed"),
        (sealed(memory(), ALL.difference(SealFlags::WRITE)), "sealed"),
        (sealed(memory(), ALL.difference(SealFlags::SHRINK)), "sealed"),
        (on_disk, "sealed"),
        (sealed(longer, ALL), "length"),
        (sealed(shorter, ALL), "length"),
        (wrong(100, ALL), "chunk 0"),
        (wrong(2 * CHUNK + 7, ALL), "chunk 2"),
        (wrong(5 * CHUNK - 1, ALL), "chunk 4"),
    ];
    for (file, reason) in &lies {
        let home = Home::new();
        let _agent = home.start();
        let told = refusal(offer(&home, &image, file));
        assert!(told.contains(reason), "{reason}: {told}");
        let clone = clone_of(&home, &image);
        assert!(memory_of(&clone) == right(), "{reason}");
        assert_ne!(
            clone.page_file().metadata().unwrap().ino(),
            file.metadata().unwrap().ino()
        );
    }
    // One after the other, and the truth at last.
    let home = Home::new();
    let _agent = home.start();
    for (file, _) in &lies {
        let _ = refusal(offer(&home, &image, file));
    }
    let file = sealed(memory(), ALL);
    offer(&home, &image, &file).unwrap();
    assert!(memory_of(&clone_of(&home, &image)) == right());
}

#[test]
fn a_file_comes_too_late_for_an_image_that_has_a_page_file_and_in_vain_for_none() {
    let image = image();
    let home = Home::new();
    let agent = home.start();
    let file = sealed(memory(), ALL);
    let clone = clone_of(&home, &image);
    let before = clone.page_file();
    let told = refusal(offer(&home, &image, &file));
    assert!(told.contains("already"), "{told}");
    // And so it is for the next agent, as long as the file is there.
    agent.stop();
    let _agent = home.start();
    let _ = refusal(offer(&home, &image, &file));
    clone.gets(0);
    assert!(clone.has(0, 1));
    assert_eq!(
        before.metadata().unwrap().ino(),
        clone.page_file().metadata().unwrap().ino()
    );

    let other = Stored::new();
    let adopt = Adopt {
        protocol: PROTOCOL_VERSION,
        image: other.path().to_str().unwrap().to_owned(),
        digest: image.manifest.digest,
        volume: VolumeName::Memory,
        machine: String::new(),
    };
    let told = |adopt: Adopt| refusal(protocol::hand_over(&home.socket(), adopt, &file, &|| false));
    let no_drive = Adopt {
        digest: other.manifest.digest,
        volume: VolumeName::Drive("root".to_owned()),
        ..adopt.clone()
    };
    let old = Adopt {
        protocol: PROTOCOL_VERSION - 1,
        ..adopt.clone()
    };
    assert!(!told(adopt).is_empty());
    assert!(told(no_drive).contains("no volume"));
    assert!(told(old).contains("version"));
}

#[test]
fn clones_go_on_when_the_machine_and_the_agent_are_gone_and_the_next_agent_serves_others() {
    let image = image();
    let home = Home::new();
    let agent = home.start();
    let file = sealed(memory(), ALL);
    offer(&home, &image, &file).unwrap();
    let clone = clone_of(&home, &image);
    drop(file);
    agent.stop();
    let _agent = home.start();
    clone.gets(3);
    assert!(clone.has(0, 1) && clone.has(3, 2));
    // It was given the file by the clone.
    let other = clone_of(&home, &image);
    assert!(memory_of(&other) == right());
    let inode = |machine: &Machine| machine.page_file().metadata().unwrap().ino();
    assert_eq!(inode(&other), inode(&clone));
}

#[test]
fn the_very_file_that_the_agent_has_is_taken_again_and_an_equal_one_is_not() {
    let image = image();
    let home = Home::new();
    let agent = home.start();
    let file = sealed(memory(), ALL);
    // At once, as the clones of a machine come back to a new agent; and later.
    thread::scope(|scope| {
        let offers = [(); 4].map(|()| scope.spawn(|| offer(&home, &image, &file)));
        offers
            .into_iter()
            .for_each(|offer| offer.join().unwrap().unwrap());
    });
    let clone = clone_of(&home, &image);
    offer(&home, &image, &file).unwrap();
    let told = refusal(offer(&home, &image, &sealed(memory(), ALL)));
    assert!(told.contains("already"), "{told}");
    assert!(memory_of(&clone) == right());
    assert_eq!(agent.status().images.len(), 1);
}

#[test]
fn an_agent_that_is_killed_while_it_looks_at_a_file_leaves_nothing_and_the_next_one_takes_it() {
    let image = image();
    let index = image.open().manifest.volumes[0].index.digest;
    let is_looking = Arc::new(AtomicBool::new(false));
    let looks = Arc::clone(&is_looking);
    // What its chunks should be it never hears.
    let server = registry_of(&image, move |digest, request, bytes| {
        if *digest != index {
            return Reply::part(request, bytes);
        }
        looks.store(true, Ordering::SeqCst);
        Reply::Hang(Vec::new())
    });
    let home = Home::new();
    let agent = Program::start(&home);
    let file = sealed(memory(), ALL);
    let url = format!("{}/web", server.base());
    let told = thread::scope(|scope| {
        let offered = scope.spawn(|| offer_at(&home, &url, &image, &file));
        while !is_looking.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        drop(agent);
        offered.join().unwrap().unwrap_err()
    });
    assert!(matches!(told, ConnectError::HungUp(_)), "{told}");
    let left = fs::read_dir(home.path().join("memory")).unwrap().flatten();
    let left: Vec<_> = left.map(|entry| entry.file_name()).collect();
    assert_eq!(left, ["lock"]);
    let _next = Program::start(&home);
    offer(&home, &image, &file).unwrap();
    assert!(memory_of(&clone_of(&home, &image)) == right());
}

#[test]
fn a_file_that_no_clone_comes_for_is_let_go_of() {
    let image = image();
    let home = Home::new();
    let agent = Agent::start(AgentSettings {
        unused_after: Duration::from_millis(20),
        ..home.settings()
    })
    .unwrap();
    let file = sealed(memory(), ALL);
    let inode = file.metadata().unwrap().ino();
    // Test and agent are one process.
    let descriptors = || {
        let all = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        let about = all.filter_map(|descriptor| std::fs::metadata(descriptor.path()).ok());
        about.filter(|about| about.ino() == inode).count()
    };
    assert_eq!(descriptors(), 1);
    offer(&home, &image, &file).unwrap();
    while descriptors() > 1 || !agent.status().images.is_empty() {
        std::thread::yield_now();
    }
    assert!(memory_of(&clone_of(&home, &image)) == right());
}
