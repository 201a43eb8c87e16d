//! A source for tests: volumes in memory, delivered when the test says so.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, OnceLock};

use super::{Arrived, ChunkFailure, ChunkId, ChunkSink, PageSource, SourceVolume, Urgency, VolumeId};
use crate::units::ChunkIndex;

/// Holds back every chunk until the test delivers it, and remembers what was asked for.
pub(crate) struct ModelSource {
    volumes: Vec<SourceVolume>,
    contents: Vec<Vec<u8>>,
    files: Vec<Arc<File>>,
    sink: OnceLock<Arc<dyn ChunkSink>>,
    asked: Mutex<Vec<(ChunkId, Urgency)>>,
}

impl ModelSource {
    pub(crate) fn new(volumes: Vec<(SourceVolume, Vec<u8>)>) -> Arc<Self> {
        let (volumes, contents): (Vec<_>, Vec<_>) = volumes.into_iter().unzip();
        let files = volumes.iter().map(|volume| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(volume.bytes).unwrap();
            Arc::new(file)
        });
        Arc::new(Self {
            files: files.collect(),
            volumes,
            contents,
            sink: OnceLock::new(),
            asked: Mutex::default(),
        })
    }

    /// What was asked for since the last call.
    pub(crate) fn asked(&self) -> Vec<(ChunkId, Urgency)> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }

    /// Waits until something satisfies `wanted`; everything asked for meanwhile is returned.
    pub(crate) fn asked_until(
        &self,
        wanted: impl Fn(&[(ChunkId, Urgency)]) -> bool,
    ) -> Vec<(ChunkId, Urgency)> {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        let mut all = Vec::new();
        loop {
            all.extend(self.asked());
            if wanted(&all) {
                return all;
            }
            assert!(
                std::time::Instant::now() < deadline,
                "only these were asked for: {all:?}"
            );
            std::thread::yield_now();
        }
    }

    /// Fills the page file and says so.
    pub(crate) fn deliver(&self, id: ChunkId) {
        let range = self.volumes[usize::from(id.volume.0)].range_of(id.chunk);
        let bytes = &self.contents[usize::from(id.volume.0)]
            [range.start as usize..(range.start + range.len) as usize];
        let what = if bytes.iter().all(|byte| *byte == 0) {
            Arrived::Zero
        } else {
            self.files[usize::from(id.volume.0)]
                .write_all_at(bytes, range.start)
                .unwrap();
            Arrived::Data
        };
        self.sink.get().unwrap().arrived(id, what);
    }

    pub(crate) fn fail(&self, id: ChunkId, reason: &str, transient: bool) {
        self.sink.get().unwrap().failed(
            id,
            ChunkFailure {
                reason: reason.to_owned(),
                transient,
            },
        );
    }
}

impl PageSource for ModelSource {
    fn volumes(&self) -> &[SourceVolume] {
        &self.volumes
    }

    fn page_file(&self, volume: VolumeId) -> Arc<File> {
        self.files[usize::from(volume.0)].clone()
    }

    fn deliver_to(&self, sink: Arc<dyn ChunkSink>) {
        assert!(self.sink.set(sink).is_ok());
    }

    fn ask(&self, chunks: &[ChunkId], urgency: Urgency) {
        self.asked
            .lock()
            .unwrap()
            .extend(chunks.iter().map(|chunk| (*chunk, urgency)));
    }

    fn cancel(&self, _: &[ChunkId]) {}
}

pub(crate) fn id(volume: u16, chunk: u64) -> ChunkId {
    ChunkId {
        volume: VolumeId(volume),
        chunk: ChunkIndex(chunk),
    }
}
