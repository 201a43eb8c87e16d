//! `runnel fork`: many machines of one image, or of a machine that runs.
//!
//! A machine that runs is saved first, while it runs on, and its clones are machines of that image. All clones are loaded
//! through one agent, so that each page is fetched and decompressed once, and shared until it is written to; or not at all,
//! where the machine can hand its own memory to the agent, and shares it with them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use clap::Args;
use runnel_snapshot::image::reference::ImageReference;
use runnel_snapshot::protocol::is_answering;
use runnel_snapshot::shell::shell_word;
use serde_json::{Value, json};

use super::Failure;
use super::agent::{AgentFlags, ensure_running};
use super::loading::LoadFlags;
use super::resume::{record_loaded, taps_of};
use super::snapshot::save;
use crate::api::Api;
use crate::boot::Override;
use crate::exit::Exit;
use crate::images::ImageStore;
use crate::monitor::{Monitor, MonitorError};
use crate::operation::Outcome;
use crate::output::{OutputArgs, print, print_json, tell};
use crate::signals::Signals;
use crate::state::{Machine, MachineName, Record, StateError, StateFolder};
use crate::taps::HostInterfaces;

const HELP: &str = "\
SOURCE is a machine that runs, or an image as `runnel resume --help` says. The clones are called NAME-1, NAME-2, …; each has
its own VMGENID, so that its guest reseeds, and its own overlays: what one writes no other sees. In what is given with --tap and
--drive, {n} stands for the clone's number. There are as many as were asked for, or none: if one cannot be started, the others
are ended, and so they are by Ctrl-C. A machine that runs is saved while it runs on, as a diff where there is an image to lie
over; that image, machine-fork in the local store unless --image says otherwise, must stay while clones of it run, and so must
the server of an image of another host that it lies over: what the machine never touched is read there. If the clones of a
machine cannot be started, its image stays, to begin again with. Clones of a machine that was booted share its memory with it,
as it was at its first fork; those of later forks, and of a machine that was resumed, have what it wrote since from the image.

Examples:
    runnel fork web-v1 -n 10
    runnel fork web -n 3 --name try --tap eth0=tap{n}
    runnel fork http://10.0.0.1:5000/web-v1 -n 100 --json";

/// Clones that are started at a time: each waits for its process most of the while.
const AT_ONCE: u32 = 8;

/// How often signals are looked for meanwhile.
const LOOK: Duration = Duration::from_millis(20);

/// What stands for a clone's number.
const NUMBER: &str = "{n}";

/// Why there are no clones.
#[derive(Debug, thiserror::Error)]
enum ForkError {
    /// A machine and an image of one name.
    #[error(
        "{name} is a machine that runs, and an image of the local store too: give the image by its path, {path}, or the \
         image to make of the machine with --image",
        path = path.display()
    )]
    Both { name: String, path: PathBuf },
    /// An image's name for what is an image.
    #[error("--image is for the image that is made of a machine which runs, and {0} is none")]
    NoMachine(String),
    /// Clones of one machine cannot share what only one can have.
    #[error(
        "{flag} {id}={value} would be given to each of {count} clones: write {NUMBER} where its number is to be, as in {id}={value}-{NUMBER}"
    )]
    Shared {
        flag: &'static str,
        id: String,
        value: String,
        count: u32,
    },
    /// The names cannot be had.
    #[error(
        "the clones cannot be called {0:?} and a number: give another --name, 1 to 50 letters, digits and hyphens"
    )]
    Name(String),
    /// One of them.
    #[error("{clone} cannot be started, and the other clones are ended")]
    Clone {
        clone: String,
        #[source]
        source: Failure,
    },
}

/// Run many machines of an image, or of a machine that runs, which share what they do not write
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct ForkArgs {
    /// The image, or the machine
    source: String,

    /// How many clones, 1 to 1000
    #[arg(long, short = 'n', value_parser = clap::value_parser!(u32).range(1..=1000))]
    number: u32,

    /// What they are called, before their numbers; the source's name unless given
    #[arg(long)]
    name: Option<String>,

    /// The number of the first
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u32).range(..1_000_000))]
    first: u32,

    /// The image to make of a machine that runs
    #[arg(long)]
    image: Option<String>,

    #[command(flatten)]
    load: LoadFlags,

    #[command(flatten)]
    agent: AgentFlags,

    #[command(flatten)]
    output: OutputArgs,
}

/// What is forked.
enum Source {
    Machine(Box<Machine>),
    Image(ImageReference),
}

pub(crate) fn run(args: &ForkArgs) -> Result<Exit, Failure> {
    let signals = Signals::take()?;
    args.load.check()?;
    args.agent.check()?;
    args.check_overrides()?;
    let store = ImageStore::of_this_user()?;
    let state = StateFolder::open()?;
    let source = args.source(&store, &state)?;
    let prefix = args.prefix(&source)?;
    let agent = ensure_running(&state, &args.agent)?;
    let start = |image: &ImageReference, agent: &Path| {
        let fork = Fork {
            args,
            state: &state,
            image,
            agent,
            prefix: &prefix,
            next: AtomicU32::new(0),
            is_over: AtomicBool::new(false),
            loading: Mutex::default(),
            taps: Mutex::default(),
        };
        fork.run(&signals)
    };
    let machine = match source {
        Source::Image(image) => return start(&image, &agent),
        Source::Machine(machine) => machine,
    };
    let target = args.target(&store, &machine)?;
    let body = json!({
        "image_path": target, "snapshot_type": "Diff", "freeze_memory": true, "agent_path": agent,
    });
    let ended = match save(&state, &machine, body, &signals)? {
        Outcome::Cancelled(signal) | Outcome::Abandoned(signal) => return Ok(Exit::Signal(signal)),
        Outcome::Overtaken(signal) => {
            tell("called off: no clone was started");
            Ok(Exit::Signal(signal))
        }
        Outcome::Done => {
            tell(format_args!("the clones' image is {}", target.display()));
            let image = store.resolve(&target.to_string_lossy())?;
            // It may have ended over what it was handed.
            match is_answering(&agent) {
                true => start(&image, &agent),
                false => ensure_running(&state, &args.agent).and_then(|agent| start(&image, &agent)),
            }
        }
    };
    if !matches!(ended, Ok(Exit::Done)) {
        tell(args.what_stays(&store, &target, &prefix));
    }
    ended
}

impl ForkArgs {
    fn source(&self, store: &ImageStore, state: &StateFolder) -> Result<Source, Failure> {
        let name = self.source.parse::<MachineName>().ok();
        let machine = match name.map(|name| state.machine(&name)) {
            Some(Ok(machine)) => machine,
            None | Some(Err(StateError::Unknown { .. })) => {
                if self.image.is_some() {
                    return Err(ForkError::NoMachine(self.source.clone()).into());
                }
                return Ok(Source::Image(store.resolve(&self.source)?));
            }
            Some(Err(error)) => return Err(error.into()),
        };
        match store.image(&self.source) {
            // Whoever says what its image is to be called means the machine.
            Ok(path) if self.image.is_none() => Err(ForkError::Both {
                name: self.source.clone(),
                path,
            }
            .into()),
            _ => Ok(Source::Machine(Box::new(machine))),
        }
    }

    /// What stands before the numbers in the clones' names.
    fn prefix(&self, source: &Source) -> Result<String, ForkError> {
        let prefix = match (&self.name, source) {
            (Some(name), _) => name.clone(),
            (None, Source::Machine(machine)) => machine.folder.name.to_string(),
            (None, Source::Image(image)) => name_of(image),
        };
        // There is room for a number of seven digits, and then some.
        let is_short = prefix.len() <= 50;
        match format!("{prefix}-1").parse::<MachineName>() {
            Ok(_) if is_short => Ok(prefix),
            _ => Err(ForkError::Name(prefix)),
        }
    }

    /// Where the image of a machine goes.
    fn target(&self, store: &ImageStore, machine: &Machine) -> Result<PathBuf, Failure> {
        if let Some(name) = &self.image {
            return Ok(store.destination(name)?);
        }
        let name = format!("{}-fork", machine.folder.name).to_lowercase();
        let first = store.destination(&name)?;
        let others = (2..).map(|number| first.with_file_name(format!("{name}-{number}")));
        let mut free = std::iter::once(first.clone())
            .chain(others)
            .filter(|path| path.symlink_metadata().is_err());
        Ok(free.next().unwrap_or(first))
    }

    /// What there is of a fork without clones. The image may have taken long, and for it alone the agent has what the machine
    /// handed over: it is not thrown away unasked.
    fn what_stays(&self, store: &ImageStore, image: &Path, prefix: &str) -> String {
        let name = image.file_name().unwrap_or_default();
        let (image, remove) = match store.path().join(name) == image {
            true => (shell_word(name), "runnel image rm"),
            false => (shell_word(image), "rm -r"),
        };
        format!(
            "the image {image} was made, and stays: `runnel fork {image} -n {} --name {prefix}` starts clones of it, \
             `{remove} {image}` removes it",
            self.number,
        )
    }

    fn check_overrides(&self) -> Result<(), ForkError> {
        let all = [("--tap", &self.load.taps), ("--drive", &self.load.drives)];
        for (flag, overrides) in all {
            let shared = overrides.iter().find(|given| !given.value.contains(NUMBER));
            if let Some(Override { id, value }) = shared.filter(|_| self.number > 1) {
                return Err(ForkError::Shared {
                    flag,
                    id: id.clone(),
                    value: value.clone(),
                    count: self.number,
                });
            }
        }
        Ok(())
    }

    fn print(&self, image: &ImageReference, clones: &[(u32, Monitor<'_>)]) -> Result<(), Failure> {
        if self.output.json {
            let machines: Vec<Value> = clones
                .iter()
                .map(|(number, monitor)| {
                    let folder = monitor.folder();
                    json!({
                        "name": folder.name.to_string(),
                        "number": number,
                        "api_socket": folder.api_socket(),
                        "console_socket": folder.console_socket(),
                        "log": folder.log(),
                    })
                })
                .collect();
            return Ok(print_json(
                &json!({ "image": image.to_string(), "machines": machines }),
            )?);
        }
        let names = clones
            .iter()
            .map(|(_, monitor)| format!("{}\n", monitor.folder().name));
        Ok(print(&names.collect::<String>())?)
    }
}

/// The last part of an image's name, as far as it can be a machine's.
fn name_of(image: &ImageReference) -> String {
    let name = match image {
        ImageReference::Directory { path, .. } => path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
        ImageReference::Remote { name, .. } => name.rsplit('/').next().unwrap_or_default().to_owned(),
    };
    let fits = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    name.chars()
        .map(fits)
        .collect::<String>()
        .trim_matches('-')
        .to_owned()
}

/// Clones being started.
struct Fork<'a> {
    args: &'a ForkArgs,
    state: &'a StateFolder,
    image: &'a ImageReference,
    agent: &'a Path,
    prefix: &'a str,
    /// How many were begun.
    next: AtomicU32,
    /// No more are begun: one has failed, or a signal came.
    is_over: AtomicBool,
    /// The APIs of those that are being loaded, by number.
    loading: Mutex<BTreeMap<u32, Api>>,
    /// The taps of those that run.
    taps: Mutex<Vec<String>>,
}

type Clones<'a> = Vec<(u32, Monitor<'a>)>;

impl<'a> Fork<'a> {
    /// Starts all clones and says which, or starts none.
    fn run(&self, signals: &Signals) -> Result<Exit, Failure> {
        let before = HostInterfaces::now();
        let mut clones = match self.start_all(signals)? {
            Ok(clones) => clones,
            Err(signal) => {
                tell("called off: the clones that ran already were ended");
                return Ok(Exit::Signal(signal));
            }
        };
        before.warn_of_new(self.taps().iter().map(String::as_str));
        clones.sort_by_key(|clone| clone.0);
        self.args.print(self.image, &clones)?;
        clones.into_iter().for_each(|(_, monitor)| monitor.keep());
        Ok(Exit::Done)
    }

    /// Starts all, or none: the signal that called it off, if one did.
    fn start_all(&self, signals: &Signals) -> Result<Result<Clones<'a>, i32>, Failure> {
        let (clones, failure, mut signal) = (Mutex::new(Vec::new()), Mutex::new(None), None);
        let work = || {
            while let Some(number) = self.take_number() {
                match self.start(number) {
                    Ok(monitor) => locked(&clones).push((number, monitor)),
                    Err(source) => {
                        self.is_over.store(true, Ordering::Relaxed);
                        let clone = format!("{}-{number}", self.prefix);
                        locked(&failure).get_or_insert(ForkError::Clone { clone, source });
                    }
                }
            }
        };
        thread::scope(|scope| {
            let workers: Vec<_> = (0..AT_ONCE.min(self.args.number))
                .map(|_| scope.spawn(work))
                .collect();
            while !workers.iter().all(thread::ScopedJoinHandle::is_finished) {
                if let Some(came) = signals.next() {
                    signal.get_or_insert(came);
                    self.is_over.store(true, Ordering::Relaxed);
                }
                if self.is_over.load(Ordering::Relaxed) {
                    self.call_off_loads();
                }
                thread::sleep(LOOK);
            }
        });
        let failure = failure.into_inner().unwrap_or_else(PoisonError::into_inner);
        match (signal.or_else(|| signals.next()), failure) {
            (Some(signal), _) => Ok(Err(signal)),
            (None, Some(failure)) => Err(failure.into()),
            (None, None) => Ok(Ok(clones.into_inner().unwrap_or_else(PoisonError::into_inner))),
        }
    }

    fn take_number(&self) -> Option<u32> {
        let begun = self.next.fetch_add(1, Ordering::Relaxed);
        let is_wanted = begun < self.args.number && !self.is_over.load(Ordering::Relaxed);
        is_wanted.then(|| self.args.first + begun)
    }

    fn start(&self, number: u32) -> Result<Monitor<'a>, Failure> {
        let name: MachineName = format!("{}-{number}", self.prefix).parse()?;
        let monitor = Monitor::start(self.state, Some(&name))?;
        let record = Record {
            image: Some(self.image.to_string()),
            agent: Some(self.agent.to_owned()),
            ..Record::now()
        };
        monitor.folder().record(&record)?;
        let load = self.args.load.of_clone(number);
        load.warn_of_rests();
        self.load(number, &monitor, &load.body(self.image, Some(self.agent)))?;
        if let Ok(config) = monitor.api().configuration() {
            record_loaded(&monitor, &config, record)?;
            locked(&self.taps).extend(taps_of(&config).map(str::to_owned));
        }
        Ok(monitor)
    }

    fn load(&self, number: u32, monitor: &Monitor<'_>, body: &Value) -> Result<(), MonitorError> {
        let api = monitor.api();
        locked(&self.loading).insert(number, api.clone());
        let loaded = api.put("/snapshot/load", body);
        locked(&self.loading).remove(&number);
        loaded.map_err(|error| monitor.refused(&error))
    }

    /// Calls off all loads that are under way. One that has not begun, or has just ended, refuses; it is looked again.
    fn call_off_loads(&self) {
        let loading: Vec<Api> = locked(&self.loading).values().cloned().collect();
        for api in loading {
            let _ = api.delete("/snapshot/load");
        }
    }

    fn taps(&self) -> MutexGuard<'_, Vec<String>> {
        locked(&self.taps)
    }
}

impl LoadFlags {
    /// Those of the clone of that number.
    fn of_clone(&self, number: u32) -> Self {
        let of_clone = |overrides: &[Override]| {
            let given = overrides.iter().map(|given| Override {
                id: given.id.clone(),
                value: given.value.replace(NUMBER, &number.to_string()),
            });
            given.collect()
        };
        Self {
            taps: of_clone(&self.taps),
            drives: of_clone(&self.drives),
            ..self.clone()
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: ForkArgs,
    }

    fn args(line: &[&str]) -> ForkArgs {
        Line::parse_from([&["x", "web"][..], line].concat()).args
    }

    #[test]
    fn each_clone_has_overrides_of_its_number() {
        let args = args(&[
            "-n",
            "3",
            "--tap",
            "eth0=tap{n}",
            "--drive",
            "scratch=/srv/{n}/s-{n}",
        ]);
        assert!(args.check_overrides().is_ok());
        let body = args.load.of_clone(12).body(&"/images/web".parse().unwrap(), None);
        assert_eq!(body["network_overrides"][0]["host_dev_name"], "tap12");
        assert_eq!(body["drive_overrides"][0]["path_on_host"], "/srv/12/s-12");
    }

    #[test]
    fn what_one_alone_can_have_is_not_given_to_several() {
        for flag in ["--tap", "--drive"] {
            let told = args(&["-n", "2", flag, "x=y"])
                .check_overrides()
                .unwrap_err()
                .to_string();
            assert!(told.contains(flag) && told.contains("x=y-{n}"), "{told}");
            assert!(args(&["-n", "1", flag, "x=y"]).check_overrides().is_ok());
        }
    }

    #[test]
    fn clones_are_called_after_their_image() {
        for (image, name) in [
            ("/srv/images/web_v1.2", "web-v1-2"),
            ("http://10.0.0.1:5000/team/web:latest", "web"),
            ("./_web", "web"),
        ] {
            assert_eq!(name_of(&image.parse().unwrap()), name);
        }
        let image = || Source::Image("/srv/__".parse().unwrap());
        assert!(matches!(
            args(&["-n", "1"]).prefix(&image()),
            Err(ForkError::Name(_))
        ));
        let named = args(&["-n", "1", "--name", "try"]);
        assert_eq!(named.prefix(&image()).unwrap(), "try");
    }
}
