//! The image that an agent delivers, as what a diff lies over: of its layers, where they can be had; of its volumes, the
//! indexes, which the agent fetches whole.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::super::message::{FromAgent, FromMonitor, IndexFound, PROTOCOL_VERSION, WantIndex};
use super::opening::ConnectError;
use super::question::{Patience, ask_once};
use crate::blobs::{BlobError, BlobStore};
use crate::causes::with_causes;
use crate::digest::BlobDigest;
use crate::image::below::{AwayImage, OneBlob};
use crate::image::manifest::{ImageVolume, URL_BYTES_MAX, URLS_MAX};
use crate::volume::VolumeName;

/// How long an agent is asked again that has no index just now: it may be restarting, or its server be away for a moment. One
/// that fetches the index is waited for, however slow its link is.
const INDEX_DEADLINE: Duration = Duration::from_secs(60);

/// How long to wait before an agent is asked again.
const AGAIN: Duration = Duration::from_millis(250);

/// See the module. What was fetched once is not fetched again.
pub struct AgentImage {
    agent: PathBuf,
    digest: BlobDigest,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    indexes: BTreeMap<VolumeName, Arc<OneBlob>>,
    /// As [`IndexFound`] has them.
    blobs_at: Vec<String>,
}

impl AgentImage {
    /// The image of that digest, which a machine runs from through the agent at `agent`.
    #[must_use]
    pub fn new(agent: &Path, digest: BlobDigest) -> Self {
        Self {
            agent: agent.to_owned(),
            digest,
            known: Mutex::default(),
        }
    }

    fn fetch(&self, volume: &ImageVolume, goes_on: &dyn Fn() -> bool) -> Result<Arc<OneBlob>, ConnectError> {
        let begun = Instant::now();
        let want = WantIndex {
            protocol: PROTOCOL_VERSION,
            image: self.digest,
            volume: volume.name.clone(),
        };
        let (found, file) = loop {
            let patience = Patience {
                deadline: None,
                give_up: &|| !goes_on(),
            };
            match ask(&self.agent, &want, &patience) {
                Ok(found) => break found,
                Err(error)
                    if !goes_on() || begun.elapsed() + AGAIN >= INDEX_DEADLINE || !may_pass(&error) =>
                {
                    return Err(error);
                }
                Err(_) => thread::sleep(AGAIN),
            }
        };
        if file.metadata().map_err(ConnectError::Local)?.len() != volume.index.bytes {
            return Err(ConnectError::Answer("an index of another length"));
        }
        let index = Arc::new(OneBlob::new(volume.index.digest, file));
        let mut known = self.known();
        known.blobs_at = found.blobs_at;
        known.indexes.insert(volume.name.clone(), index.clone());
        Ok(index)
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AwayImage for AgentImage {
    fn index(
        &self,
        volume: &ImageVolume,
        goes_on: &dyn Fn() -> bool,
    ) -> Result<Arc<dyn BlobStore>, BlobError> {
        let known = self.known().indexes.get(&volume.name).cloned();
        let index = match known {
            Some(index) => index,
            None => self
                .fetch(volume, goes_on)
                .map_err(|error| BlobError::Unavailable {
                    digest: volume.index.digest,
                    reason: with_causes(&error),
                    transient: may_pass(&error),
                })?,
        };
        Ok(index)
    }

    fn urls(&self, blob: &BlobDigest) -> Vec<String> {
        let known = self.known();
        let urls = known
            .blobs_at
            .iter()
            .map(|place| format!("{place}{}", blob.hex()));
        urls.filter(|url| url.len() <= URL_BYTES_MAX)
            .take(URLS_MAX)
            .collect()
    }
}

/// Whether asking again can help.
fn may_pass(error: &ConnectError) -> bool {
    matches!(
        error,
        ConnectError::Connect { .. } | ConnectError::HungUp(_) | ConnectError::Busy(_)
    )
}

fn ask(agent: &Path, want: &WantIndex, patience: &Patience<'_>) -> Result<(IndexFound, File), ConnectError> {
    let (answer, files) = ask_once(agent, &FromMonitor::WantIndex(want.clone()), &[], patience)?;
    match answer {
        FromAgent::Index(found) => match files.into_iter().next() {
            Some(file) => Ok((found, file.into())),
            None => Err(ConnectError::Answer("an index without its file")),
        },
        FromAgent::Refused(refused) if refused.transient => Err(ConnectError::Busy(refused.reason)),
        FromAgent::Refused(refused) => Err(ConnectError::NoIndex(refused.reason)),
        _ => Err(ConnectError::Answer("it is no index")),
    }
}
