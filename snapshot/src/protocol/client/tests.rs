use std::os::fd::AsFd as _;
use std::sync::mpsc;

use super::super::message::{BadMessage, Hello, Opened};
use super::*;
use crate::protocol::message::OpenedVolume;
use crate::protocol::{PROTOCOL_VERSION, PacketListener, Refused};
use crate::source::{Arrived, model::id};
use crate::units::ChunkSize;
use crate::volume::VolumeName;

/// What the sink heard.
#[derive(Debug, PartialEq, Eq)]
enum Heard {
    Arrived(ChunkId, Arrived),
    Failed(ChunkId, String),
}

struct Ear(Mutex<mpsc::Sender<Heard>>);

impl ChunkSink for Ear {
    fn arrived(&self, chunk: ChunkId, what: Arrived) {
        self.0.lock().unwrap().send(Heard::Arrived(chunk, what)).unwrap();
    }

    fn failed(&self, chunk: ChunkId, failure: ChunkFailure) {
        self.0
            .lock()
            .unwrap()
            .send(Heard::Failed(chunk, failure.reason))
            .unwrap();
    }
}

/// An agent played by the test.
struct Agent {
    listener: PacketListener,
    pages: File,
}

struct AgentLine(PacketSocket);

const BYTES: u64 = 1 << 20;

fn memfd(bytes: &[u8]) -> File {
    use std::os::unix::fs::FileExt as _;
    let file = File::from(rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(bytes, 0).unwrap();
    file
}

impl Agent {
    fn accept(&self) -> (AgentLine, Hello) {
        let line = AgentLine(self.listener.accept().unwrap());
        let FromMonitor::Hello(hello) = line.heard() else {
            panic!("no Hello first")
        };
        (line, hello)
    }

    fn open(&self, line: &AgentLine, pages: &File) {
        let volume = OpenedVolume {
            name: VolumeName::Memory,
            bytes: BYTES,
            chunk_size: ChunkSize::DEFAULT,
        };
        let opened = Opened {
            digest: BlobDigest::of(b"image"),
            volumes: vec![volume],
        };
        let (state, manifest) = (memfd(b"state"), memfd(b"manifest"));
        let files = [state.as_fd(), manifest.as_fd(), pages.as_fd()];
        line.0
            .send(&FromAgent::Opened(opened).to_bytes(), &files)
            .unwrap();
    }
}

impl AgentLine {
    fn heard(&self) -> FromMonitor {
        let mut message = Vec::new();
        self.0.receive(&mut message).unwrap();
        FromMonitor::parse(&message).unwrap()
    }

    fn say(&self, message: &FromAgent) {
        self.0.send(&message.to_bytes(), &[]).unwrap();
    }
}

struct Rig {
    agent: Agent,
    opening: Opening,
    _folder: tempfile::TempDir,
}

fn rig() -> Rig {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.sock");
    let pages = memfd(&[]);
    pages.set_len(BYTES).unwrap();
    let agent = Agent {
        listener: PacketListener::bind(&path).unwrap(),
        pages,
    };
    let deadline = Duration::from_secs(60);
    let opening = Opening {
        agent: path,
        image: "http://host/web".into(),
        machine: "m1".into(),
        deadline,
    };
    Rig {
        agent,
        opening,
        _folder: folder,
    }
}

fn opened(rig: &Rig) -> (AgentSource, AgentLine, mpsc::Receiver<Heard>) {
    let (source, line) = std::thread::scope(|scope| {
        let source = scope.spawn(|| AgentSource::open(rig.opening.clone()).unwrap());
        let (line, hello) = rig.agent.accept();
        assert_eq!(
            (hello.image.as_str(), hello.digest, hello.protocol),
            ("http://host/web", None, PROTOCOL_VERSION)
        );
        rig.agent.open(&line, &rig.agent.pages);
        (source.join().unwrap(), line)
    });
    let (sender, heard) = mpsc::channel();
    source.deliver_to(Arc::new(Ear(Mutex::new(sender))));
    (source, line, heard)
}

#[test]
fn an_image_opens_with_its_state_manifest_and_page_files() {
    let rig = rig();
    let (source, _line, _heard) = opened(&rig);
    assert_eq!(
        (source.state(), source.manifest()),
        (&b"state"[..], &b"manifest"[..])
    );
    assert_eq!(source.volumes()[0].bytes, BYTES);
    assert_eq!(source.page_file(VolumeId(0)).metadata().unwrap().len(), BYTES);
}

#[test]
fn chunks_are_asked_for_cancelled_and_answered() {
    let rig = rig();
    let (source, line, heard) = opened(&rig);
    source.ask(&[id(0, 1), id(0, 2)], Urgency::Demand);
    assert_eq!(
        line.heard(),
        FromMonitor::Ask(Urgency::Demand, vec![id(0, 1), id(0, 2)])
    );
    source.cancel(&[id(0, 2)]);
    assert_eq!(line.heard(), FromMonitor::Cancel(vec![id(0, 2)]));
    line.say(&FromAgent::Arrived(vec![
        (id(0, 1), Arrived::Data),
        (id(0, 3), Arrived::Zero),
    ]));
    line.say(&FromAgent::Failed(
        id(0, 2),
        ChunkFailure {
            reason: "no".into(),
            transient: false,
        },
    ));
    assert_eq!(heard.recv().unwrap(), Heard::Arrived(id(0, 1), Arrived::Data));
    assert_eq!(heard.recv().unwrap(), Heard::Arrived(id(0, 3), Arrived::Zero));
    assert_eq!(heard.recv().unwrap(), Heard::Failed(id(0, 2), "no".into()));
}

#[test]
fn a_new_agent_is_asked_again_for_what_is_outstanding_and_only_for_that() {
    let rig = rig();
    let (source, line, heard) = opened(&rig);
    source.ask(&[id(0, 1), id(0, 2), id(0, 3)], Urgency::Fill);
    source.ask(&[id(0, 3)], Urgency::Demand);
    line.say(&FromAgent::Arrived(vec![(id(0, 1), Arrived::Data)]));
    assert_eq!(heard.recv().unwrap(), Heard::Arrived(id(0, 1), Arrived::Data));
    drop(line);
    assert_eq!(
        heard.recv().unwrap(),
        Heard::Failed(id(0, 2), "the agent has ended".into())
    );
    assert_eq!(
        heard.recv().unwrap(),
        Heard::Failed(id(0, 3), "the agent has ended".into())
    );

    let (line, hello) = rig.agent.accept();
    assert_eq!(hello.digest, Some(source.digest()));
    rig.agent.open(&line, &rig.agent.pages);
    assert_eq!(line.heard(), FromMonitor::Ask(Urgency::Demand, vec![id(0, 3)]));
    assert_eq!(line.heard(), FromMonitor::Ask(Urgency::Fill, vec![id(0, 2)]));
    line.say(&FromAgent::Arrived(vec![(id(0, 3), Arrived::Zero)]));
    assert_eq!(heard.recv().unwrap(), Heard::Arrived(id(0, 3), Arrived::Zero));
}

#[test]
fn a_source_that_is_dropped_does_not_wait_for_a_new_agent_that_says_nothing() {
    let rig = rig();
    let (source, line, heard) = opened(&rig);
    drop(line);
    let (silent, _) = rig.agent.accept();
    drop(source);
    let mut message = Vec::new();
    silent.0.receive(&mut message).unwrap();
    assert!(message.is_empty(), "the monitor hangs up");
    assert!(heard.recv().is_err(), "and its thread ends");
}

#[test]
fn an_agent_with_other_page_files_is_not_used_and_the_reason_is_told() {
    let rig = rig();
    let (source, line, heard) = opened(&rig);
    source.ask(&[id(0, 2)], Urgency::Demand);
    drop(line);
    assert_eq!(
        heard.recv().unwrap(),
        Heard::Failed(id(0, 2), "the agent has ended".into())
    );
    let (line, _) = rig.agent.accept();
    let others = memfd(&[]);
    others.set_len(BYTES).unwrap();
    rig.agent.open(&line, &others);
    let Heard::Failed(_, reason) = heard.recv().unwrap() else {
        panic!()
    };
    assert!(reason.contains("other page files"), "{reason}");
}

#[test]
fn page_files_that_nobody_can_change_are_handed_to_the_next_agent_and_it_may_have_others() {
    let mut rig = rig();
    let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
    rig.agent.pages = rustix::fs::memfd_create("test", flags).unwrap().into();
    rig.agent.pages.set_len(BYTES).unwrap();
    use rustix::fs::SealFlags;
    let all = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW;
    rustix::fs::fcntl_add_seals(&rig.agent.pages, all).unwrap();
    let (source, line, heard) = opened(&rig);
    source.ask(&[id(0, 2)], Urgency::Demand);
    drop(line);
    let Heard::Failed(..) = heard.recv().unwrap() else {
        panic!()
    };

    let line = AgentLine(rig.agent.listener.accept().unwrap());
    let mut message = Vec::new();
    let files = line.0.receive(&mut message).unwrap();
    let FromMonitor::Adopt(adopt) = FromMonitor::parse(&message).unwrap() else {
        panic!("a page file first")
    };
    assert_eq!(
        (adopt.digest, adopt.volume, adopt.image.as_str()),
        (source.digest(), VolumeName::Memory, "http://host/web")
    );
    let inode = |file: &File| file.metadata().unwrap().ino();
    let handed: Vec<u64> = files.into_iter().map(|file| inode(&file.into())).collect();
    assert_eq!(handed, [inode(&rig.agent.pages)]);
    line.say(&FromAgent::Refused(Refused {
        reason: "there is one already".into(),
        transient: false,
    }));

    let (line, _) = rig.agent.accept();
    let others = memfd(&[]);
    others.set_len(BYTES).unwrap();
    rig.agent.open(&line, &others);
    assert_eq!(line.heard(), FromMonitor::Ask(Urgency::Demand, vec![id(0, 2)]));
}

#[test]
fn refusals_silence_and_nonsense_are_told_apart() {
    let rig = rig();
    let attempt = |answer: &(dyn Fn(&AgentLine) + Sync), deadline| {
        std::thread::scope(|scope| {
            let opening = Opening {
                deadline,
                ..rig.opening.clone()
            };
            let source = scope.spawn(move || AgentSource::open(opening).err().unwrap());
            let (line, _) = rig.agent.accept();
            answer(&line);
            source.join().unwrap()
        })
    };
    let long = Duration::from_secs(60);
    let refused = Refused {
        reason: "no such image".into(),
        transient: false,
    };
    let error = attempt(&|line| line.say(&FromAgent::Refused(refused.clone())), long);
    assert!(matches!(error, ConnectError::Refused(reason) if reason == "no such image"));
    let error = attempt(&|line| line.0.send(&[250], &[]).unwrap(), long);
    assert!(matches!(error, ConnectError::Message(BadMessage::Kind(250))));
    let short = memfd(&[]);
    let error = attempt(&|line| rig.agent.open(line, &short), long);
    assert!(matches!(error, ConnectError::Answer(_)));
    let error = attempt(&|_| {}, Duration::ZERO);
    assert!(matches!(
        error,
        ConnectError::TimedOut(_) | ConnectError::HungUp(_)
    ));

    let nobody = Opening {
        agent: rig.opening.agent.with_extension("none"),
        ..rig.opening.clone()
    };
    assert!(matches!(
        AgentSource::open(nobody),
        Err(ConnectError::Connect { .. })
    ));
}

#[test]
fn an_agent_that_hangs_up_before_it_answers_is_found_out_whatever_it_was_asked() {
    let rig = rig();
    let (path, long) = (&rig.opening.agent, rig.opening.deadline);
    let adopt = Adopt {
        protocol: PROTOCOL_VERSION,
        image: rig.opening.image.clone(),
        digest: BlobDigest::of(b"image"),
        volume: VolumeName::Memory,
        machine: rig.opening.machine.clone(),
    };
    let questions: [&(dyn Fn() -> ConnectError + Sync); 3] = [
        &|| status(path, long).unwrap_err(),
        &|| hand_over(path, adopt.clone(), &rig.agent.pages, &|| false).unwrap_err(),
        &|| AgentSource::open(rig.opening.clone()).err().unwrap(),
    ];
    for question in questions {
        std::thread::scope(|scope| {
            let asked = scope.spawn(question);
            let line = AgentLine(rig.agent.listener.accept().unwrap());
            line.heard();
            drop(line);
            let error = asked.join().unwrap();
            let ConnectError::HungUp(end) = &error else {
                panic!("{error}")
            };
            assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
        });
    }
}

#[test]
fn more_asks_than_the_socket_holds_are_all_sent() {
    let rig = rig();
    let (source, line, _heard) = opened(&rig);
    let chunks: Vec<_> = (0..CHUNKS_MAX as u64).map(|chunk| id(0, chunk)).collect();
    for _ in 0..50 {
        source.ask(&chunks, Urgency::Fill);
    }
    for _ in 0..50 {
        assert_eq!(line.heard(), FromMonitor::Ask(Urgency::Fill, chunks.clone()));
    }
}
