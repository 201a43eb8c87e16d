//! What is read of a machine's description, for whoever feeds it strange ones.

use runnel_snapshot::machine::Paused;
use runnel_snapshot::section::{SavedSection, Section as _};

use super::description::Description;

/// Reads a section as what a machine is made of. Whether it is that.
///
/// # Panics
/// When it does not come back as it was saved again.
#[must_use]
pub fn reads_description(section: SavedSection) -> bool {
    if section.kind != Description::KIND {
        return false;
    }
    let Ok(state) = section.state_of::<Description>() else {
        return false;
    };
    let Ok(description) = Description::restore((), state) else {
        return false;
    };
    let save = |description: &Description| {
        let saved = description.save(&Paused::until(|| ()));
        saved.expect("what was read can be saved")
    };
    let saved = save(&description);
    let again = Description::restore((), saved.clone()).expect("what was saved can be read");
    assert_eq!(save(&again), saved);
    true
}
