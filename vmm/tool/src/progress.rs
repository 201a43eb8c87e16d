//! How far something is, on standard error: a bar on a terminal, else a line every few seconds.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output::tell;
use crate::size;

/// How often a line is written where there is no terminal.
const LINES_APART: Duration = Duration::from_secs(5);

/// What is shown of something that takes a while. Dropping it clears the bar.
#[derive(Debug)]
pub(crate) struct ProgressView {
    what: String,
    shown: Shown,
}

/// Where the bar's length is known, and where it is not: then it would be full at once.
const WITH_BAR: &str =
    "{prefix}  {wide_bar}  {binary_bytes} of {binary_total_bytes}  {binary_bytes_per_sec}  {msg}";
const WITHOUT_BAR: &str = "{prefix}  {msg}";

/// The templates are constants, and wrong ones are found by the test below.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

#[derive(Debug)]
enum Shown {
    Bar(ProgressBar),
    Lines {
        last: Instant,
        /// The last one, which is not said again.
        said: String,
    },
}

impl ProgressView {
    /// Of what is called `what`, as in `snapshot web`.
    pub(crate) fn new(what: String) -> Self {
        let shown = if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            bar.set_style(style(WITHOUT_BAR));
            bar.set_prefix(what.clone());
            Shown::Bar(bar)
        } else {
            Shown::Lines {
                last: Instant::now(),
                said: String::new(),
            }
        };
        Self { what, shown }
    }

    /// So much is done, of so much; 0 in all while that is not known.
    pub(crate) fn show(&mut self, phase: &str, done: u64, total: u64) {
        match &mut self.shown {
            Shown::Bar(bar) => {
                if bar.length() == Some(0) && total > 0 {
                    bar.set_style(style(WITH_BAR));
                }
                bar.set_length(total);
                bar.set_position(done.min(total));
                bar.set_message(phase.to_owned());
            }
            Shown::Lines { last, said } if last.elapsed() >= LINES_APART => {
                *last = Instant::now();
                if let Some(line) = news(said, line(&self.what, phase, done, total)) {
                    tell(line);
                }
            }
            Shown::Lines { .. } => {}
        }
    }
}

impl Drop for ProgressView {
    fn drop(&mut self) {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}

/// A line, unless it is the one that was said last.
fn news(said: &mut String, line: String) -> Option<&str> {
    if *said == line {
        return None;
    }
    *said = line;
    Some(said)
}

/// How far `what` is, in a line.
pub(crate) fn line(what: &str, phase: &str, done: u64, total: u64) -> String {
    let phase = if phase.is_empty() {
        String::new()
    } else {
        format!(", {phase}")
    };
    match total {
        0 => format!("{what}{phase}"),
        _ => format!(
            "{what}: {} ({} of {}){phase}",
            size::share(done.min(total), total),
            size::bytes(done.min(total)),
            size::bytes(total)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_right_and_a_bar_gets_its_length_when_it_is_known() {
        for template in [WITH_BAR, WITHOUT_BAR] {
            ProgressStyle::with_template(template).unwrap();
        }
        let mut view = ProgressView {
            what: "resume web".into(),
            shown: Shown::Bar(ProgressBar::with_draw_target(
                Some(0),
                ProgressDrawTarget::hidden(),
            )),
        };
        let length = |view: &ProgressView| match &view.shown {
            Shown::Bar(bar) => bar.length(),
            Shown::Lines { .. } => None,
        };
        view.show("opening", 0, 0);
        assert_eq!(length(&view), Some(0));
        view.show("copying", 1, 9);
        assert_eq!(length(&view), Some(9));
    }

    #[test]
    fn a_line_that_says_nothing_new_is_not_said_again() {
        let mut said = String::new();
        let lines = ["web: 1 %", "web: 1 %", "web: 2 %", "web: 1 %"].map(str::to_owned);
        let told: Vec<bool> = lines
            .into_iter()
            .map(|line| news(&mut said, line).is_some())
            .collect();
        assert_eq!(told, [true, false, true, true]);
    }

    #[test]
    fn lines_say_what_is_known() {
        assert_eq!(
            line("snapshot web", "copying", 512, 1024),
            "snapshot web: 50.0 % (512 B of 1 KiB), copying"
        );
        assert_eq!(line("resume web", "opening", 0, 0), "resume web, opening");
        assert_eq!(line("verify", "", 9, 4), "verify: 100 % (4 B of 4 B)");
    }
}
