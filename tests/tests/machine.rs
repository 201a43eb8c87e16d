//! Machines of the monitor's library, without its process: the bare guest on this host's KVM.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use runnel_tests::bare_guest;
use runnel_vmm::config::{BootSource, MemorySize, MicrovmConfig, Serial};
use runnel_vmm::exit::{EndSignal, Ended};
use runnel_vmm::microvm::Microvm;
use tempfile::TempDir;

/// Far longer than anything here takes: a test that waits so long has failed.
const DEADLINE: Duration = Duration::from_secs(30);

/// A machine with the bare guest, and the other end of its serial console.
struct Bare {
    machine: Microvm,
    end: EndSignal,
    console: BufReader<UnixStream>,
    _folder: TempDir,
}

impl Bare {
    fn new(command_line: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("console");
        let end = EndSignal::new().unwrap();
        let mut config = MicrovmConfig::default();
        config.machine.memory = MemorySize::from_mib(64).unwrap();
        config.boot_source = Some(BootSource {
            kernel: bare_guest().to_owned(),
            initrd: None,
            boot_args: Some(command_line.to_owned()),
        });
        config.serial = Serial::Socket(socket.clone());
        let machine = Microvm::build(&config, &end).unwrap();
        let console = UnixStream::connect(socket).unwrap();
        console.set_read_timeout(Some(DEADLINE)).unwrap();
        Self {
            machine,
            end,
            console: BufReader::new(console),
            _folder: folder,
        }
    }

    fn started(command_line: &str) -> Self {
        let mut bare = Self::new(command_line);
        bare.machine.unpause();
        assert!(bare.line().starts_with("guest=bare ram="));
        bare
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        let read = self.console.read_line(&mut line);
        assert!(
            read.is_ok(),
            "{read:?} after {line:?}; ended: {:?}",
            self.end.ended()
        );
        line.trim_end().to_owned()
    }

    fn tell(&mut self, words: &str) -> String {
        writeln!(self.console.get_mut(), "{words}").unwrap();
        self.line()
    }
}

#[test]
fn the_bare_guest_fills_memory_and_switches_itself_off() {
    let mut bare = Bare::started("fill:4m:1m:7 checkfill:4m:1m:7 checkfill:4m:2m:7 count:2 poweroff");
    assert_eq!(bare.line(), "fill=done");
    assert_eq!(bare.line(), "checkfill=right");
    assert_eq!(bare.line(), "checkfill=wrong page=0x500000 holds=0x0");
    assert_eq!(bare.line(), "count=1");
    assert_eq!(bare.line(), "count=2");
    assert_eq!(bare.end.wait(DEADLINE), Some(&Ended::PowerOff));
}

#[test]
fn each_way_to_end_is_told_from_the_others() {
    let ways = [
        ("poweroff", Ended::PowerOff),
        ("reset", Ended::Reset),
        ("i8042reset", Ended::Reset),
        ("triplefault", Ended::TripleFault),
    ];
    for (word, how) in ways {
        assert_eq!(Bare::started(word).end.wait(DEADLINE), Some(&how), "{word}");
    }
}

#[test]
fn the_guest_does_what_is_typed_however_much_it_is() {
    let mut bare = Bare::started("");
    assert_eq!(bare.line(), "listening=1");
    assert_eq!(bare.tell("poke:0x500000:77"), "poke=done");
    assert_eq!(bare.tell("peek:0x500000"), "peek=0x4d");
    // Far more than the port's FIFO holds: what does not fit is held back.
    let blanks = " ".repeat(200);
    assert_eq!(bare.tell(&format!("{blanks}count:1")), "count=1");
    for expected in 2..20 {
        assert_eq!(bare.tell("count:1"), format!("count={expected}"));
    }
}

#[test]
fn a_paused_guest_stands_and_goes_on_where_it_was() {
    let mut bare = Bare::started("count:0");
    let mut expected = 0;
    for _ in 0..50 {
        bare.machine.pause(&|| false).unwrap();
        let written = || {
            let metrics = bare.machine.board().serial().metrics();
            metrics.written_bytes.load(std::sync::atomic::Ordering::Relaxed)
        };
        let before = written();
        std::thread::yield_now();
        assert_eq!(written(), before);
        bare.machine.unpause();
        for _ in 0..3 {
            expected += 1;
            assert_eq!(bare.line(), format!("count={expected}"));
        }
    }
}
