//! The chunk protocol, in both directions, and its handshake; and what a guest says on its channel.

use std::cell::RefCell;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd as _, BorrowedFd};

use runnel_snapshot::protocol::{
    CHUNKS_MAX, FromAgent, FromMonitor, MESSAGE_BYTES_MAX, PacketSocket, VOLUMES_MAX, read_opening,
};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::input::Input;

/// What a monitor says.
pub fn from_monitor(bytes: &[u8]) -> bool {
    let Ok(message) = FromMonitor::parse(bytes) else {
        return false;
    };
    if let FromMonitor::Ask(_, chunks) | FromMonitor::Cancel(chunks) = &message {
        assert!(chunks.len() <= CHUNKS_MAX);
    }
    let again = FromMonitor::parse(&message.to_bytes());
    assert_eq!(again.expect("what is said can be heard"), message);
    true
}

/// What an agent says.
pub fn from_agent(bytes: &[u8]) -> bool {
    let Ok(message) = FromAgent::parse(bytes) else {
        return false;
    };
    let said = message.to_bytes();
    let again = FromAgent::parse(&said).expect("what is said can be heard");
    match &message {
        FromAgent::Arrived(chunks) => assert!(chunks.len() <= CHUNKS_MAX),
        // Reasons are cut.
        FromAgent::Failed(chunk, _) => assert!(matches!(&again, FromAgent::Failed(same, _) if same == chunk)),
        _ => {}
    }
    if matches!(
        message,
        FromAgent::Arrived(_) | FromAgent::Opened(_) | FromAgent::Index(_)
    ) {
        assert_eq!(again, message);
    }
    // An image that is opened is named by few volumes, and a status is cut; a sender does not cut the others.
    if matches!(message, FromAgent::Status(_)) {
        assert!(said.len() <= MESSAGE_BYTES_MAX);
    }
    true
}

/// An agent's first answer with its descriptors: how many, lengths of state, manifest and page files, the message.
pub fn opening(bytes: &[u8]) -> bool {
    thread_local! {
        static FILES: RefCell<Vec<File>> = RefCell::default();
    }
    let mut input = Input::new(bytes);
    let count = usize::from(input.u8()) % (VOLUMES_MAX + 3);
    let lengths: Vec<u64> = (0..count).map(|_| u64::from(input.u16()) << 8).collect();
    let message = input.rest();
    if message.is_empty() || message.len() > MESSAGE_BYTES_MAX {
        return false;
    }
    FILES.with_borrow_mut(|files| {
        while files.len() < count {
            let file = memfd_create("page file", MemfdFlags::CLOEXEC).expect("a memfd can be had");
            files.push(File::from(file));
        }
        for (file, length) in files.iter().zip(&lengths) {
            file.set_len(*length).expect("a memfd takes a length");
        }
        let (near, far) = PacketSocket::pair().expect("a socket can be had");
        let descriptors: Vec<BorrowedFd<'_>> = files[..count].iter().map(|file| file.as_fd()).collect();
        if far.send(message, &descriptors).is_err() {
            return false;
        }
        drop(far);
        let Ok((opened, documents)) = read_opening(near) else {
            return false;
        };
        assert_eq!(opened.volumes.len() + 2, count, "a page file a volume");
        assert_eq!(documents.map(|len| len as u64)[..], lengths[..2]);
        for (volume, length) in opened.volumes.iter().zip(&lengths[2..]) {
            assert!(
                volume.bytes <= *length,
                "a page file that is too short ends in SIGBUS"
            );
        }
        true
    })
}

/// A kernel's file, or whatever else is read from a descriptor.
pub(crate) fn in_memory(bytes: &[u8]) -> File {
    let file = memfd_create("bytes", MemfdFlags::CLOEXEC).expect("a memfd can be had");
    let mut file = File::from(file);
    file.write_all(bytes).expect("a memfd takes all");
    file
}

/// What a guest says on its channel.
pub fn guest_channel(bytes: &[u8]) -> bool {
    runnel_vmm::guest_channel::fuzz::hears(bytes)
}
