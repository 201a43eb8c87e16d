//! `runnel logs`: what a machine's monitor has written.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use super::Failure;
use crate::ending::Ending;
use crate::exit::Exit;
use crate::output::{print_bytes, tell};
use crate::signals::Signals;
use crate::state::{Machine, MachineName, StateError, StateFolder};

const HELP: &str = "\
What the monitor wrote is shown, and not what the guest did: that is on the machine's console. Of a machine that has ended,
the log of the last one of that name is shown; those before it are named in `runnel ps --help`.

Examples:
    runnel logs web
    runnel logs web --follow               until it has ended, or Ctrl-C";

/// How often it is looked whether there is more.
const LOOK: Duration = Duration::from_millis(100);

/// What is read at once.
const PIECE_BYTES: usize = 64 << 10;

/// Print the log of a machine's monitor
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct LogsArgs {
    /// The machine; also one that has ended
    machine: MachineName,

    /// Go on with what is written from now on, until the machine has ended
    #[arg(long, short)]
    follow: bool,
}

/// A log cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("the log {path} cannot be read", path = path.display())]
struct Unreadable {
    path: PathBuf,
    source: io::Error,
}

/// A log that is open: it is the same file when it has moved to those of ended machines.
struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    fn open(path: PathBuf) -> Result<Self, Unreadable> {
        match File::open(&path) {
            Ok(file) => Ok(Self { path, file }),
            Err(source) => Err(Unreadable { path, source }),
        }
    }

    /// Prints what was not printed yet.
    fn print_rest(&mut self) -> Result<(), Failure> {
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            match self.file.read(&mut piece) {
                Ok(0) => return Ok(()),
                Ok(len) => print_bytes(&piece[..len])?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    let path = self.path.clone();
                    return Err(Unreadable { path, source }.into());
                }
            }
        }
    }
}

pub(crate) fn run(args: &LogsArgs) -> Result<Exit, Failure> {
    let state = StateFolder::open()?;
    let kept = state.ended_log(&args.machine);
    let machine = match state.machine(&args.machine) {
        Ok(machine) => Some(machine),
        Err(StateError::Unknown { .. }) if kept.exists() => None,
        Err(error) => return Err(error.into()),
    };
    let Some(machine) = machine else {
        Log::open(kept)?.print_rest()?;
        return Ok(Exit::Done);
    };
    // Another command may have put it away meanwhile.
    let mut log = Log::open(machine.folder.log()).or_else(|_| Log::open(kept.clone()))?;
    if args.follow {
        return follow(&mut log, &state, &machine, &kept);
    }
    log.print_rest()?;
    Ok(Exit::Done)
}

fn follow(log: &mut Log, state: &StateFolder, machine: &Machine, kept: &Path) -> Result<Exit, Failure> {
    let signals = Signals::take()?;
    log.print_rest()?;
    loop {
        let has_ended = machine.process.wait(LOOK)?;
        // Afterwards, so that its last words are among them.
        log.print_rest()?;
        if has_ended {
            state.forget(&machine.folder)?;
            tell(format_args!(
                "{} has ended{}",
                machine.folder.name,
                Ending::of(kept)
            ));
            return Ok(Exit::Done);
        }
        if let Some(signal) = signals.next() {
            return Ok(Exit::Signal(signal));
        }
    }
}
