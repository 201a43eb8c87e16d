//! `runnel agent`: the process that fetches chunks of images of other hosts; and how `resume` comes by one.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use runnel_agent::agent::Agent;
use runnel_agent::cli::{AgentArguments, tidy_up};
use runnel_snapshot::protocol::{
    AdoptedVolume, AgentStatus, CacheStatus, ImageStatus, PoolStatus, is_answering, status,
};
use runnel_snapshot::shell::shell_word;
use rustix::process::Signal;

use super::Failure;
use crate::exit::Exit;
use crate::monitor::FAREWELL;
use crate::output::{OutputArgs, is_verbose, print, print_json};
use crate::process::ProcessId;
use crate::program::{self, last_words, log_bytes};
use crate::remote::{RemoteFlagError, RemoteFlags};
use crate::signals::Signals;
use crate::size;
use crate::state::{StateFolder, check_socket};
use crate::table::{Table, one_line};

/// How long an agent may take until it listens.
const START: Duration = Duration::from_secs(10);

/// How often it is looked at meanwhile.
const LOOK: Duration = Duration::from_millis(2);

/// How long an agent may take to say how it is.
const STATUS: Duration = Duration::from_secs(5);

/// The longest trouble that is shown. An agent tells of no longer one.
const TROUBLE_CHARS_MAX: usize = 4096;

const HELP: &str = "\
Fetches, verifies and keeps chunks of images of other hosts for this user's machines. `runnel resume` starts one if none
runs; this starts it by hand, with other settings, in the foreground. One that is killed is followed by one that goes on
with the same files.

--status shows each image once, where it is read now: RECEIVED and SENT are what it cost, for all of its MACHINES
together, which share its pages. `runnel ps` counts what each has been given. KEPT is what its pages take here, and SAVED what
did not have to be fetched, because another image has the same chunks. Memory that a machine handed over, as `runnel fork` has
it do, is the machine's and no part of KEPT; a line tells of it. Below stands what all pages take, of how much.

Pages that are over --memory-quota or --drive-quota, or for which there is no room, are taken out again: first those of images
that no machine uses, the longest unused first, then what machines are least likely to need. They fetch what they still need
when they next touch it.

An agent that `resume` started logs to agent.log beside its socket; one started by hand, to standard error.

Passwords and tokens are read from --credentials, else $REGISTRY_AUTH_FILE, else ~/.docker/config.json, as `docker login`
and `skopeo login` write them. The token of `runnel serve` is any user's password there.

Examples:
    runnel agent --fill-rate 50000000
    runnel agent --memory-quota 8G --drive-quota 100G
    runnel agent --status          or: runnel agent status
    runnel agent --stop            or: runnel agent stop";

/// Why there is no agent.
#[derive(Debug, thiserror::Error)]
enum AgentCommandError {
    /// The one that was named does not answer.
    #[error(
        "no agent answers at {0}: start one with `runnel agent --socket {word}`, or leave --agent out",
        word = shell_word(.0)
    )]
    NotThere(PathBuf),
    /// None runs.
    #[error(
        "no agent runs: `runnel resume` starts one when it needs one, and `runnel agent` one for machines that wait for it"
    )]
    NoneRuns,
    /// One runs already.
    #[error("an agent runs already at {0}: `runnel agent --stop` ends it")]
    RunsAlready(PathBuf),
    /// It ended at once.
    #[error("the agent ended at once ({status}):\n{log}")]
    Ended {
        /// How.
        status: ExitStatus,
        /// What it said.
        log: String,
    },
    /// It does not answer.
    #[error("the agent that was started does not answer; its log is {0}")]
    Silent(PathBuf),
    /// It was asked to end, and has not.
    #[error("the agent (process {0}) was asked to end and has not")]
    StillRuns(u32),
}

/// Fetch chunks for this user's machines
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct AgentArgs {
    /// What to do with the agent that runs: as --status and --stop
    #[arg(value_enum, value_name = "status|stop", hide_possible_values = true, conflicts_with_all = ["status", "stop"])]
    word: Option<AgentWord>,

    #[command(flatten)]
    agent: AgentArguments,

    /// Show what the agent that runs has open, and what that cost
    #[arg(long, conflicts_with = "stop")]
    status: bool,

    /// End the agent that runs. Machines that still wait for chunks stall until there is another
    #[arg(long)]
    stop: bool,

    #[command(flatten)]
    output: OutputArgs,
}

/// What `--status` and `--stop` are to those who write words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum AgentWord {
    Status,
    Stop,
}

/// Which agent is used.
#[derive(Clone, Debug, Args)]
pub(crate) struct AgentFlags {
    /// Socket of the agent; this user's own, which is started if need be, unless given
    #[arg(long, value_name = "SOCKET")]
    agent: Option<PathBuf>,

    /// For an agent that is started now.
    #[command(flatten)]
    remote: RemoteFlags,
}

impl AgentFlags {
    /// Looks at the files that were given, whether they will be needed or not.
    ///
    /// # Errors
    /// When one cannot be read.
    pub(crate) fn check(&self) -> Result<(), RemoteFlagError> {
        self.remote.check()
    }
}

pub(crate) fn run(args: &AgentArgs) -> Result<Exit, Failure> {
    let signals = Signals::take()?;
    let state = StateFolder::open()?;
    let arguments = with_defaults(&args.agent, &state);
    let socket = arguments.socket.clone().unwrap_or_else(|| state.agent_socket());
    if args.status || args.word == Some(AgentWord::Status) {
        return show_status(&socket, args.output);
    }
    if args.stop || args.word == Some(AgentWord::Stop) {
        return stop(&socket, args.output);
    }
    if is_answering(&socket) {
        return Err(AgentCommandError::RunsAlready(socket).into());
    }
    let settings = arguments.settings()?;
    let drive_folder = settings.drive_folder.clone();
    let agent = Agent::start(settings)?;
    match args.output.json {
        true => print_json(&serde_json::json!({ "socket": socket }))?,
        false => print(&format!(
            "the agent listens at {}; Ctrl-C ends it\n",
            socket.display()
        ))?,
    }
    let signal = signals.wait()?;
    agent.stop_soon()?;
    tidy_up(&drive_folder);
    // To be ended is what it waits for, so that is no failure.
    tracing::debug!(signal, "ended");
    Ok(Exit::Done)
}

/// Fills in what the tool knows better than the agent.
fn with_defaults(arguments: &AgentArguments, state: &StateFolder) -> AgentArguments {
    let given = arguments.clone();
    AgentArguments {
        socket: given.socket.or_else(|| Some(state.agent_socket())),
        ..given
    }
}

fn show_status(socket: &Path, output: OutputArgs) -> Result<Exit, Failure> {
    let status = ask(socket)?;
    if output.json {
        print_json(&status)?;
        return Ok(Exit::Done);
    }
    let mut table = Table::new(&["IMAGE", "DIGEST", "MACHINES", "RECEIVED", "SENT", "KEPT", "SAVED"]);
    for image in &status.images {
        table.push(vec![
            one_line(&image.image, 60),
            image.digest.to_string().chars().take(19).collect(),
            image.machines.to_string(),
            size::bytes(image.bytes_received),
            size::bytes(image.bytes_sent),
            size::bytes(image.bytes_kept),
            size::bytes(image.bytes_saved),
        ]);
    }
    print(&format!("the agent is process {}\n{table}", status.process))?;
    let CacheStatus { memory, drives } = status.cache;
    for (kind, pool) in [("memory", memory), ("drives", drives)] {
        print(&pool_line(kind, pool))?;
    }
    for image in &status.images {
        for adopted in &image.adopted {
            print(&adopted_line(image, adopted))?;
        }
        if let Some(trouble) = &image.trouble {
            let name = one_line(&image.image, 60);
            let trouble = one_line(trouble, TROUBLE_CHARS_MAX);
            print(&format!(
                "{name} cannot be read at {trouble}\n{}",
                trouble_cure(image)
            ))?;
        }
        if let Some(unkept) = &image.unkept {
            let name = one_line(&image.image, 60);
            let unkept = one_line(unkept, TROUBLE_CHARS_MAX);
            print(&format!(
                "what arrives of {name} cannot be kept: {unkept}\n    make room there: it is tried again and again\n"
            ))?;
        }
    }
    Ok(Exit::Done)
}

/// What page files of one kind take.
fn pool_line(kind: &str, pool: PoolStatus) -> String {
    let evicted = match pool.bytes_evicted {
        0 => String::new(),
        bytes => format!("; {} were taken out to make room", size::bytes(bytes)),
    };
    let (bytes, bytes_max) = (size::bytes(pool.bytes), size::bytes(pool.bytes_max));
    format!("pages of {kind} take {bytes} of {bytes_max}{evicted}\n")
}

/// Of which volume the pages are somebody else's.
fn adopted_line(image: &ImageStatus, adopted: &AdoptedVolume) -> String {
    format!(
        "{} of {} is that of the machine it was made of: {}, which its clones share with it\n",
        adopted.volume,
        one_line(&image.image, 60),
        size::bytes(adopted.bytes)
    )
}

/// What helps an image that cannot be read somewhere.
fn trouble_cure(image: &ImageStatus) -> &'static str {
    match image.machines {
        0 => "",
        _ => {
            "    machines that wait for it go on once it can be read there again, or once it is resumed from another URL of \
             it, which is then read for all of them\n"
        }
    }
}

fn ask(socket: &Path) -> Result<AgentStatus, Failure> {
    if !is_answering(socket) {
        return Err(AgentCommandError::NoneRuns.into());
    }
    Ok(status(socket, STATUS)?)
}

fn stop(socket: &Path, output: OutputArgs) -> Result<Exit, Failure> {
    let pid = ask(socket)?.process;
    // Nothing, if it has just ended by itself.
    if let Some(process) = ProcessId::of(pid).and_then(ProcessId::open) {
        process.signal(Signal::TERM)?;
        if !process.wait(FAREWELL)? {
            return Err(AgentCommandError::StillRuns(pid).into());
        }
    }
    match output.json {
        true => print_json(&serde_json::json!({ "ended": pid }))?,
        false => print("the agent has ended\n")?,
    }
    Ok(Exit::Done)
}

/// The socket of an agent that runs; this user's own is started if it does not.
pub(crate) fn ensure_running(state: &StateFolder, flags: &AgentFlags) -> Result<PathBuf, Failure> {
    let warn = || {
        if flags.remote.are_given() {
            tracing::warn!(
                "an agent runs already, and keeps the --credentials and --tls-ca that it was started with: \
                 `runnel agent --stop` ends it"
            );
        }
    };
    if let Some(socket) = &flags.agent {
        warn();
        return match is_answering(socket) {
            true => Ok(std::path::absolute(socket)?),
            false => Err(AgentCommandError::NotThere(socket.clone()).into()),
        };
    }
    let socket = state.agent_socket();
    // Whoever cannot be connected to is not started in vain.
    check_socket(&socket)?;
    if !is_answering(&socket) {
        start(state, flags, &socket)?;
        tracing::debug!("an agent was started; it logs to {}", agent_log(state).display());
    } else {
        warn();
        tracing::debug!("an agent runs already at {}", socket.display());
    }
    Ok(socket)
}

fn agent_log(state: &StateFolder) -> PathBuf {
    state.agent().join("agent.log")
}

fn start(state: &StateFolder, flags: &AgentFlags, socket: &Path) -> Result<(), Failure> {
    let log = agent_log(state);
    let before = log_bytes(&log);
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("agent");
    if is_verbose() {
        command.arg("--verbose");
    }
    flags.remote.pass_on(&mut command);
    program::detach(&mut command, &log)?;
    let mut child = command.spawn()?;
    let deadline = Instant::now() + START;
    while !is_answering(socket) {
        // If two commands start one each, the second agent finds the first in its place; that one serves both.
        if let Some(status) = child.try_wait()?
            && !is_answering(socket)
        {
            let log = last_words(&log, before, 8, &log);
            return Err(AgentCommandError::Ended { status, log }.into());
        }
        if Instant::now() > deadline {
            return Err(AgentCommandError::Silent(log).into());
        }
        thread::sleep(LOOK);
    }
    Ok(())
}
