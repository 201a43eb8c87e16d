//! What the tool's process ends with.

/// Shown by `--help`.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
    0  done
    1  something failed; standard error says what
    2  the command line cannot be understood, or a name or URL in it cannot be one
    3  verify found damage, doctor something that Runnel cannot do without, or wait's --timeout was over
  130  called off with Ctrl-C (128 and the signal's number for any other)
run and resume in the foreground end with the monitor's own code once the machine has ended (`runnel-vmm --help`
lists them), and with 0 when its console was left with Ctrl-].";

/// How a command ended that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// All is well.
    Done,
    /// It looked at something that is not sound.
    Unsound,
    /// It waited for something that has not come.
    Unfinished,
    /// A signal called it off.
    Signal(i32),
    /// The machine has ended, and its monitor with this code.
    Monitor(u8),
}

/// The code of a command that failed.
pub(crate) const FAILED: u8 = 1;

/// The code of a command that could not be understood, as the parser of the command line ends with it.
pub(crate) const USAGE: u8 = 2;

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Done => 0,
            Exit::Unsound | Exit::Unfinished => 3,
            // The shell's way of saying which signal it was.
            Exit::Signal(signal) => u8::try_from(128 + signal).unwrap_or(FAILED),
            Exit::Monitor(code) => code,
        })
    }
}
