//! Taps that were not there before a machine started: a monitor that may makes them, and they go with it. Whoever
//! mistyped a name would look for the network elsewhere, so it is told.

use std::collections::BTreeSet;
use std::fs;

use runnel_snapshot::shell::shell_word;

/// The names of this host's network interfaces.
#[derive(Debug, Default)]
pub(crate) struct HostInterfaces(BTreeSet<String>);

impl HostInterfaces {
    /// Those that are there now; none, where the kernel does not say.
    pub(crate) fn now() -> Self {
        let entries = fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
        Self(
            entries
                .filter_map(|entry| entry.file_name().into_string().ok())
                .collect(),
        )
    }

    /// Warns of the taps of a machine that was started since, and that were not there.
    pub(crate) fn warn_of_new<'t>(&self, taps: impl Iterator<Item = &'t str>) {
        for tap in taps {
            if let Some(warning) = self.warning(tap) {
                tracing::warn!("{warning}");
            }
        }
    }

    fn warning(&self, tap: &str) -> Option<String> {
        // Where not even the loopback was seen, nothing is known.
        let is_new = !self.0.is_empty() && !self.0.contains(tap);
        is_new.then(|| {
            format!(
                "there was no tap {tap}: it was made for this machine, goes with it, and is joined to nothing; to have \
                 one with an address or in a bridge, make it beforehand (`ip tuntap add {word} mode tap`)",
                word = shell_word(tap)
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tap_that_was_not_there_is_warned_of_and_one_that_was_is_not() {
        let host = HostInterfaces(["lo", "tap0"].map(str::to_owned).into());
        assert!(host.warning("nope").unwrap().contains("no tap nope"));
        assert_eq!(host.warning("tap0"), None);
        assert_eq!(HostInterfaces::default().warning("tap0"), None);
    }
}
