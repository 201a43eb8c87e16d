//! Sections: the versioned pieces of machine state, and the contract of everything that has one.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::machine::Paused;

/// Something of a machine that has state of its own: a vCPU, an interrupt controller, a device.
///
/// There are no default methods: a device that forgets its state does not compile. `State` structs are plain data in
/// a `state.rs` of their own; what is read back comes from an untrusted image, so `restore` checks every field.
pub trait Section: Sized {
    /// What kind of section this is, as written in the image: `vcpu`, `serial`, `virtio-block`.
    const KIND: &'static str;
    /// The version of `State`; it rises when an older reader could no longer make sense of it.
    const VERSION: u32;
    /// Plain data that survives a round trip through JSON.
    type State: Serialize + DeserializeOwned;
    /// What the rebuilt thing needs beside its state: guest memory, interrupts, files.
    type Deps;
    /// Why it could not be saved or rebuilt.
    type Error;

    /// Copies the state out of a machine that stands still.
    ///
    /// # Errors
    /// When the state cannot be read, for instance from KVM.
    fn save(&self, paused: &Paused<'_>) -> Result<Self::State, Self::Error>;

    /// Builds the thing from its state.
    ///
    /// # Errors
    /// When the state makes no sense, or this host cannot carry it.
    fn restore(deps: Self::Deps, state: Self::State) -> Result<Self, Self::Error>;
}

/// One section as an image carries it: which, in which version, and its state as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedSection {
    /// [`Section::KIND`].
    pub kind: String,
    /// Which one of its kind: a vCPU's number, a drive's identifier; empty where there is but one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// [`Section::VERSION`] of the writer.
    pub version: u32,
    /// [`Section::State`].
    pub state: serde_json::Value,
}

/// Why a saved section cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SectionError {
    /// The writer was newer.
    #[error(
        "section {kind:?} has version {found}, and this Runnel reads up to {supported}: resume it with a newer Runnel"
    )]
    Newer {
        /// The section's kind.
        kind: String,
        /// The version in the image.
        found: u32,
        /// The newest version that this Runnel reads.
        supported: u32,
    },
    /// The state is not what its kind and version promise.
    #[error("section {kind:?} {id:?} does not hold what its version promises")]
    Malformed {
        /// The section's kind.
        kind: String,
        /// Which one of its kind.
        id: String,
        /// What serde found.
        #[source]
        source: serde_json::Error,
    },
}

impl SavedSection {
    /// Wraps the state of `S`.
    ///
    /// # Errors
    /// When the state has no JSON form (a map with keys that are not text, a number that is not finite).
    pub fn of<S: Section>(id: impl Into<String>, state: &S::State) -> Result<Self, SectionError> {
        let id = id.into();
        let state = serde_json::to_value(state).map_err(|source| SectionError::Malformed {
            kind: S::KIND.to_owned(),
            id: id.clone(),
            source,
        })?;
        Ok(Self {
            kind: S::KIND.to_owned(),
            id,
            version: S::VERSION,
            state,
        })
    }

    /// Reads the state of `S` back. Whoever calls it has looked at `kind`.
    ///
    /// # Errors
    /// When the section is newer than this Runnel, or malformed.
    pub fn state_of<S: Section>(self) -> Result<S::State, SectionError> {
        debug_assert_eq!(self.kind, S::KIND);
        if self.version > S::VERSION {
            return Err(SectionError::Newer {
                kind: self.kind,
                found: self.version,
                supported: S::VERSION,
            });
        }
        serde_json::from_value(self.state).map_err(|source| SectionError::Malformed {
            kind: self.kind,
            id: self.id,
            source,
        })
    }
}
