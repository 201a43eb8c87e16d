//! How a machine ended, as the last lines of its monitor's log say.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use crate::table::one_line;

/// How much of the log's end is looked through.
const TAIL_BYTES: u64 = 16 << 10;

/// The longest reason that is shown.
const REASON_CHARS_MAX: usize = 300;

/// How a machine ended, as far as that is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ending {
    /// What the guest did, or what befell it; nothing of a monitor that was killed.
    pub(crate) reason: Option<String>,
    /// The monitor's exit code; nothing of one that was killed.
    pub(crate) code: Option<u8>,
}

impl Ending {
    /// Reads it from a log. Of one that cannot be read nothing is known.
    pub(crate) fn of(log: &Path) -> Self {
        let tail = tail(log).unwrap_or_default();
        let last = |mark: &str| {
            let mut lines = tail.lines().rev();
            lines.find_map(|line| Some(line.split_once(mark)?.1.trim_end_matches('.')))
        };
        let reason = last("The machine ended: ").map(|reason| one_line(reason, REASON_CHARS_MAX));
        let code = last("Runnel exiting. exit_code=").and_then(|code| code.parse().ok());
        let was_asked = || (code == Some(0)).then(|| "its monitor was asked to end".to_owned());
        Self {
            reason: reason.or_else(was_asked),
            code,
        }
    }
}

impl fmt::Display for Ending {
    /// What follows «has ended».
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.reason, self.code) {
            (Some(reason), None | Some(0)) => write!(f, ": {reason}"),
            (Some(reason), Some(code)) => write!(f, " with code {code}: {reason}"),
            (None, Some(0)) => Ok(()),
            (None, Some(code)) => write!(f, " with code {code}"),
            (None, None) => f.write_str(", and its log does not say how"),
        }
    }
}

fn tail(log: &Path) -> io::Result<String> {
    let mut file = File::open(log)?;
    let bytes = file.metadata()?.len();
    file.seek(SeekFrom::Start(bytes.saturating_sub(TAIL_BYTES)))?;
    let mut tail = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut tail)?;
    Ok(String::from_utf8_lossy(&tail).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ending_is_what_the_end_of_a_log_says() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("web.log");
        let ended = |text: &str| {
            std::fs::write(&log, text).unwrap();
            Ending::of(&log).to_string()
        };
        let much = "x\n".repeat(20_000);
        let off = "1 [x:main:INFO] The machine ended: the guest switched itself off.\n";
        let code = |code: u8| format!("2 [x:main:INFO] Runnel exiting. exit_code={code}\n");
        assert_eq!(
            ended(&format!("{much}{off}{}", code(0))),
            ": the guest switched itself off"
        );
        let fault = "1 [x] The machine ended: the guest ended in a triple fault.\n";
        assert_eq!(
            ended(&format!("{fault}{}", code(3))),
            " with code 3: the guest ended in a triple fault"
        );
        assert_eq!(ended(&code(0)), ": its monitor was asked to end");
        assert_eq!(ended(&code(1)), " with code 1");
        assert_eq!(ended(&much), ", and its log does not say how");
        assert_eq!(Ending::of(&folder.path().join("none")), Ending::default());
    }
}
