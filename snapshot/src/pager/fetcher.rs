//! Which chunks a machine has, which it waits for: asks a [`PageSource`], asks again after failures, fills the rest
//! in the background, and knows when the machine is stalled.
//!
//! ```text
//!            ask                      arrived
//!   absent ───────► asked ──────────────────────────► data | zero
//!     ▲               │ failed ▲ retry, when its time has come
//!     │ lost          └────────┴─ (somebody waits too long, or in vain) ── stalled, visible in `stall()`
//!     └────────────────────────── data (the page file no longer holds it)
//! ```
//!
//! One fetcher serves a whole machine: its memory through [`MemoryPager`](super::MemoryPager), its drives through
//! overlays that block in [`Fetcher::wait`]. That a chunk has arrived says that it was in the page file at some time: who
//! maps it learns from the kernel whether it still is, and who reads it does so through [`Fetcher::read_held`].

mod fill;
mod held;
mod queue;
mod report;
mod room;
mod settings;

use std::fs::File;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::source::{
    Arrived, ChunkFailure, ChunkId, ChunkSink, Marks, PageSource, SourceVolume, Urgency, VolumeId,
};
use crate::units::ChunkIndex;
use crate::volume::VolumeName;
use crate::working_set::WorkingSet;

use super::touches::Touches;
use super::waits::{Histogram, Waits};
use queue::{Pending, Queue, Work};
pub use report::{FetcherCounters, Stall};
pub use settings::FetcherSettings;

const ABSENT: u8 = 0;
const DATA: u8 = 1;
const ZERO: u8 = 2;

/// Why a chunk is waited for of which nothing has been heard.
const NOTHING_YET: &str = "its source is away, or slow: nothing of it has come yet";

/// Called on the source's thread when a chunk of a volume has arrived.
type ArrivalHook = Box<dyn Fn(ChunkIndex, Arrived) + Send + Sync>;

struct Volume {
    about: SourceVolume,
    /// `ABSENT`, `DATA` or `ZERO`, one a chunk; read without a lock on the fault path.
    chunks: Vec<AtomicU8>,
    /// What was taken out of the page file; `None` where nothing ever is.
    marks: Option<Marks>,
    on_arrival: OnceLock<ArrivalHook>,
}

/// See the module.
pub struct Fetcher {
    source: Arc<dyn PageSource>,
    settings: FetcherSettings,
    volumes: Vec<Volume>,
    work: Arc<Work>,
    arrived_data: AtomicU64,
    arrived_zero: AtomicU64,
    demanded: AtomicU64,
    failures: AtomicU64,
    waits: Histogram,
    touches: Touches,
}

impl Fetcher {
    /// Connects to `source` and starts the thread that repeats and fills. Fill starts with [`Fetcher::start_fill`],
    /// so that a resume's first chunks have the link to themselves.
    ///
    /// # Errors
    /// When a page file cannot be used, or the thread cannot be started.
    pub fn start(source: Arc<dyn PageSource>, settings: FetcherSettings) -> std::io::Result<Arc<Self>> {
        let volumes = (0..).zip(source.volumes());
        let volumes = volumes.map(|(id, about)| Volume::new(about, &source.page_file(VolumeId(id))));
        let volumes = volumes.collect::<std::io::Result<_>>()?;
        let work = Arc::<Work>::default();
        let fetcher = Arc::new(Self {
            source: source.clone(),
            settings,
            volumes,
            work: work.clone(),
            arrived_data: AtomicU64::new(0),
            arrived_zero: AtomicU64::new(0),
            demanded: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            waits: Histogram::default(),
            touches: Touches::default(),
        });
        source.deliver_to(Arc::new(Sink(Arc::downgrade(&fetcher))));
        let weak = Arc::downgrade(&fetcher);
        std::thread::Builder::new()
            .name("fetcher".into())
            .spawn(move || repeat_and_fill(&weak, &work))?;
        Ok(fetcher)
    }

    /// The volumes of the source.
    #[must_use]
    pub fn source(&self) -> &Arc<dyn PageSource> {
        &self.source
    }

    /// The volume with this name.
    #[must_use]
    pub fn volume_named(&self, name: &VolumeName) -> Option<(VolumeId, &SourceVolume)> {
        let position = self
            .volumes
            .iter()
            .position(|volume| volume.about.name == *name)?;
        Some((
            VolumeId(u16::try_from(position).ok()?),
            &self.volumes[position].about,
        ))
    }

    /// Has `hook` called whenever a chunk of `volume` arrives, on the source's thread.
    ///
    /// # Panics
    /// If the volume has a hook already.
    pub fn on_arrival(&self, volume: VolumeId, hook: impl Fn(ChunkIndex, Arrived) + Send + Sync + 'static) {
        let set = self.volumes[usize::from(volume.0)].on_arrival.set(Box::new(hook));
        assert!(set.is_ok(), "a volume's chunks arrive at one place");
    }

    /// Whether the chunk has arrived, and what it is. Takes no lock. A chunk outside its volume never arrives.
    #[must_use]
    pub fn state(&self, id: ChunkId) -> Option<Arrived> {
        match self.slot(id)?.load(Ordering::Acquire) {
            DATA => Some(Arrived::Data),
            ZERO => Some(Arrived::Zero),
            _ => None,
        }
    }

    /// Somebody waits for this chunk: asks for it, and its neighbours, before everything else. Answers at once; if
    /// the chunk is not here yet the volume's hook hears of it, or [`wait`](Self::wait) returns.
    pub fn demand(&self, id: ChunkId) -> Option<Arrived> {
        self.demand_as(id, |pending| pending.is_needed = true)
    }

    /// [`demand`](Self::demand), for a wait that `note` puts down.
    fn demand_as(&self, id: ChunkId, note: impl FnOnce(&mut Pending)) -> Option<Arrived> {
        if let Some(arrived) = self.state(id) {
            return Some(arrived);
        }
        let newly = {
            let mut queue = self.work.lock();
            // The arrival may have come between the look above and the lock; it takes the lock to say so.
            if let Some(arrived) = self.state(id) {
                return Some(arrived);
            }
            let now = Instant::now();
            let pending = queue.pending.entry(id).or_insert_with(Pending::new);
            note(pending);
            if pending.demanded.is_some() {
                return None;
            }
            pending.demanded = Some(now);
            let newly = pending.urgency < Urgency::Demand || pending.retry_at.is_some();
            pending.urgency = Urgency::Demand;
            pending.retry_at = None;
            newly
        };
        self.demanded.fetch_add(1, Ordering::Relaxed);
        if newly {
            self.source.ask(&[id], Urgency::Demand);
        }
        self.prefetch(&self.neighbours_of(id));
        None
    }

    /// These chunks will be wanted soon: asks for those that are neither here nor under way.
    pub fn prefetch(&self, chunks: &[ChunkId]) {
        let mut wanted: Vec<ChunkId> = chunks
            .iter()
            .copied()
            .filter(|id| self.slot(*id).is_some() && self.state(*id).is_none())
            .collect();
        if wanted.is_empty() {
            return;
        }
        {
            let mut queue = self.work.lock();
            wanted.retain(|id| self.state(*id).is_none() && queue.add(*id, Urgency::Soon));
        }
        if !wanted.is_empty() {
            self.source.ask(&wanted, Urgency::Soon);
        }
    }

    /// Waits until the chunk is here, however long that takes.
    ///
    /// # Errors
    /// When the fetcher is stopped meanwhile, or the chunk lies outside its volume.
    pub fn wait(&self, id: ChunkId) -> std::io::Result<Arrived> {
        if self.slot(id).is_none() {
            return Err(std::io::Error::other(format!(
                "{} lies outside its volume",
                id.chunk
            )));
        }
        if let Some(arrived) = self.demand(id) {
            return Ok(arrived);
        }
        let mut queue = self.work.lock();
        loop {
            if let Some(arrived) = self.state(id) {
                return Ok(arrived);
            }
            if queue.stopping {
                return Err(std::io::Error::other("the machine is being taken down"));
            }
            queue = self
                .work
                .changed
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until the chunk is here, for somebody who would rather give up than wait for ever.
    ///
    /// # Errors
    /// When `give_up` says so, when the chunk cannot be had for a reason that does not pass by itself, or when it
    /// stays away for as long as stalls a machine.
    pub fn wait_unless(&self, id: ChunkId, give_up: &dyn Fn() -> bool) -> std::io::Result<Arrived> {
        /// How often `give_up` is asked.
        const LOOK: Duration = Duration::from_millis(100);
        if self.slot(id).is_none() {
            return Err(std::io::Error::other(format!(
                "{} lies outside its volume",
                id.chunk
            )));
        }
        if let Some(arrived) = self.demand_as(id, |pending| pending.may_give_up += 1) {
            return Ok(arrived);
        }
        let begun = Instant::now();
        loop {
            if give_up() {
                self.work.lock().give_up(id);
                return Err(std::io::Error::other("given up while waiting for a chunk"));
            }
            let mut queue = self.work.lock();
            if let Some(arrived) = self.state(id) {
                return Ok(arrived);
            }
            let failure = queue.pending.get(&id).and_then(|pending| pending.failed.as_ref());
            let reason = failure.map_or(NOTHING_YET, |(failure, _)| failure.reason.as_str());
            let hopeless = failure.is_some_and(|(failure, _)| !failure.transient);
            if queue.stopping || hopeless || begun.elapsed() >= self.settings.stall_after {
                let name = &self.volumes[usize::from(id.volume.0)].about.name;
                let error = format!("{} of {name} cannot be had: {reason}", id.chunk);
                queue.give_up(id);
                return Err(std::io::Error::other(error));
            }
            queue = self
                .work
                .changed
                .wait_timeout(queue, LOOK)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            drop(queue);
        }
    }

    /// The page file turned out not to hold this chunk any more: it is absent again, and demanded.
    pub fn lost(&self, id: ChunkId) {
        self.forget(id);
        self.demand(id);
    }

    /// The page file turned out not to hold this chunk any more: it is absent again, and nobody waits for it yet.
    fn forget(&self, id: ChunkId) {
        if let Some(slot) = self.slot(id)
            && slot.swap(ABSENT, Ordering::AcqRel) == DATA
        {
            self.arrived_data.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Begins to fetch, in the background and volume by volume, what nobody has asked for. Does nothing if the
    /// settings say so.
    pub fn start_fill(&self) {
        if self.settings.fill && !self.volumes.is_empty() {
            let mut queue = self.work.lock();
            queue.fill.begin();
            queue.news = true;
            self.work.changed.notify_all();
        }
    }

    /// Why the machine is stalled, if it is: a write for which there is no room, or the oldest wait that takes too long;
    /// those of the guest count before others.
    #[must_use]
    pub fn stall(&self) -> Option<Stall> {
        self.stall_for_room().or_else(|| self.stall_for_chunk())
    }

    fn stall_for_chunk(&self) -> Option<Stall> {
        let queue = self.work.lock();
        let now = Instant::now();
        let waits = || {
            queue
                .pending
                .iter()
                .filter_map(|(id, pending)| Some((id, pending, pending.demanded?)))
        };
        let stalls = |(_, pending, since): &(&ChunkId, &Pending, Instant)| {
            pending.is_hopeless() || now.duration_since(*since) >= self.settings.stall_after
        };
        let oldest = |(_, pending, since): &(&ChunkId, &Pending, Instant)| (!pending.is_needed, *since);
        let (id, pending, since) = waits().filter(stalls).min_by_key(oldest)?;
        let reason = match &pending.failed {
            Some((failure, _)) => failure.reason.clone(),
            None => NOTHING_YET.to_owned(),
        };
        Some(Stall {
            volume: self.volumes[usize::from(id.volume.0)].about.name.clone(),
            chunk: id.chunk,
            reason,
            waiting: now.duration_since(since),
            chunks_waited_for: waits().count(),
            holds_guest: pending.is_needed,
            needs_repair: pending.is_hopeless(),
        })
    }

    /// What has been done so far.
    #[must_use]
    pub fn counters(&self) -> FetcherCounters {
        FetcherCounters {
            data_chunks: self.arrived_data.load(Ordering::Relaxed),
            zero_chunks: self.arrived_zero.load(Ordering::Relaxed),
            demanded_chunks: self.demanded.load(Ordering::Relaxed),
            failures: self.failures.load(Ordering::Relaxed),
            chunks_total: self.volumes.iter().map(|volume| volume.chunks.len() as u64).sum(),
        }
    }

    /// How long those waited that waited for a chunk and got it.
    #[must_use]
    pub fn waits(&self) -> Waits {
        self.waits.read()
    }

    /// Notes from now on which chunks the guest touches, in the order in which it first does.
    pub fn record_touches(&self) {
        self.touches.begin();
    }

    /// The guest touches a chunk, whether it is here or not.
    pub fn touched(&self, id: ChunkId) {
        self.touches.note(id);
    }

    /// Ends the recording: the chunks that the guest has touched, but for those that turned out to be zeros.
    #[must_use]
    pub fn recorded(&self) -> WorkingSet {
        let touched = self.touches.end().into_iter();
        let has_data = |id: &ChunkId| self.state(*id) != Some(Arrived::Zero);
        WorkingSet::of(self.source.volumes(), touched.filter(has_data))
    }

    /// Ends the thread and every [`wait`](Self::wait).
    pub fn stop(&self) {
        self.work.lock().stopping = true;
        self.work.changed.notify_all();
    }

    fn slot(&self, id: ChunkId) -> Option<&AtomicU8> {
        self.volumes
            .get(usize::from(id.volume.0))?
            .chunks
            .get(usize::try_from(id.chunk.0).ok()?)
    }

    /// The chunks around `id`: those behind it, then those before it.
    fn neighbours_of(&self, id: ChunkId) -> Vec<ChunkId> {
        let Some(volume) = self.volumes.get(usize::from(id.volume.0)) else {
            return Vec::new();
        };
        let block = (self.settings.neighbourhood_bytes / volume.about.chunk_size.bytes()).max(1);
        let first = id.chunk.0 / block * block;
        let end = (first + block).min(volume.chunks.len() as u64);
        (id.chunk.0 + 1..end)
            .chain(first..id.chunk.0)
            .map(|chunk| ChunkId {
                chunk: ChunkIndex(chunk),
                ..id
            })
            .collect()
    }

    fn arrived(&self, id: ChunkId, what: Arrived) {
        let Some(slot) = self.slot(id) else { return };
        {
            let mut queue = self.work.lock();
            let (state, counter) = match what {
                Arrived::Data => (DATA, &self.arrived_data),
                Arrived::Zero => (ZERO, &self.arrived_zero),
            };
            if slot.swap(state, Ordering::AcqRel) == ABSENT {
                counter.fetch_add(1, Ordering::Relaxed);
            }
            if let Some(pending) = queue.pending.remove(&id) {
                if pending.fills {
                    queue.fill.got_one();
                    queue.news = true;
                }
                if pending.is_hopeless() {
                    // Somebody has repaired the image.
                    queue.fill.hurry();
                    queue.news = true;
                }
                if let Some(since) = pending.demanded {
                    self.waits.add(since.elapsed());
                }
            }
        }
        self.work.changed.notify_all();
        if let Some(hook) = self.volumes[usize::from(id.volume.0)].on_arrival.get() {
            hook(id.chunk, what);
        }
    }

    fn failed(&self, id: ChunkId, failure: ChunkFailure) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        let mut queue = self.work.lock();
        let queue = &mut *queue;
        let Some(pending) = queue.pending.get_mut(&id) else {
            return;
        };
        // An outage that turns out to be damage is news.
        let is_new = match &pending.failed {
            Some((before, _)) => before.transient && !failure.transient,
            None => true,
        };
        if is_new && let Some(others) = queue.complaints.next(now) {
            let volume = &self.volumes[usize::from(id.volume.0)].about.name;
            let reason = &failure.reason;
            tracing::warn!(%volume, chunk = id.chunk.0, others, reason, "a chunk could not be had");
        }
        if !failure.transient {
            if std::mem::take(&mut pending.fills) {
                queue.fill.lost_one(now, &self.settings);
            }
            if pending.demanded.is_none() {
                // Nobody waits for it. It is asked for again when somebody does, or by the next round of the fill.
                queue.pending.remove(&id);
                queue.fill.has_gaps = true;
                queue.news = true;
                return self.work.changed.notify_all();
            }
        }
        let attempts = pending.failed.as_ref().map_or(0, |(_, attempts)| *attempts) + 1;
        // A failure that asking again cannot cure now may be cured by somebody who repairs the store: it is asked
        // for again too, after longer pauses.
        let (first, last) = if failure.transient {
            (self.settings.retry_min, self.settings.retry_max)
        } else {
            (self.settings.retry_max, self.settings.retry_max * 4)
        };
        let pause = first.saturating_mul(1 << (attempts - 1).min(16)).min(last);
        pending.failed = Some((failure, attempts));
        pending.retry_at = Some(now + pause);
        queue.news = true;
        self.work.changed.notify_all();
    }

    /// What the thread has to ask for now, and when to look again.
    fn due(&self, queue: &mut Queue) -> (Vec<(ChunkId, Urgency)>, Option<Instant>) {
        let now = Instant::now();
        let mut asks = Vec::new();
        let mut next = None;
        for (id, pending) in &mut queue.pending {
            match pending.retry_at {
                Some(at) if at <= now => {
                    pending.retry_at = None;
                    asks.push((*id, pending.urgency));
                }
                Some(at) => next = Some(next.map_or(at, |next: Instant| next.min(at))),
                None => {}
            }
        }
        queue.fill.begin_again_if_need_be(now, &self.settings);
        match queue.fill.paused_until {
            Some(until) if until > now => next = Some(next.map_or(until, |next| next.min(until))),
            _ => {
                queue.fill.paused_until = None;
                while queue.fill.under_way < self.settings.fill_window
                    && let Some(id) = queue.fill.next
                {
                    queue.fill.next = self.after(id);
                    if self.slot(id).is_some() && self.state(id).is_none() && queue.add(id, Urgency::Fill) {
                        queue.fill.under_way += 1;
                        asks.push((id, Urgency::Fill));
                    }
                }
            }
        }
        (asks, next)
    }

    fn after(&self, id: ChunkId) -> Option<ChunkId> {
        let volume = self.volumes.get(usize::from(id.volume.0))?;
        if id.chunk.0 + 1 < volume.chunks.len() as u64 {
            return Some(ChunkId {
                chunk: ChunkIndex(id.chunk.0 + 1),
                ..id
            });
        }
        let volume = VolumeId(id.volume.0.checked_add(1)?);
        (usize::from(volume.0) < self.volumes.len()).then_some(ChunkId {
            volume,
            chunk: ChunkIndex(0),
        })
    }
}

impl Drop for Fetcher {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Volume {
    fn new(about: &SourceVolume, page_file: &File) -> std::io::Result<Self> {
        let chunks = about.chunk_size.chunks_in(about.bytes);
        Ok(Self {
            about: about.clone(),
            chunks: (0..chunks).map(|_| AtomicU8::new(ABSENT)).collect(),
            marks: Marks::of(page_file, about.layout())?,
            on_arrival: OnceLock::new(),
        })
    }
}

/// How long the thread sleeps when nothing is due; it is woken whenever something is.
const IDLE: Duration = Duration::from_secs(60);

fn repeat_and_fill(fetcher: &Weak<Fetcher>, work: &Work) {
    // The fetcher is held only while it is looked at: dropping the last other reference ends the thread.
    while let Some(fetcher) = fetcher.upgrade() {
        let mut queue = work.lock();
        if queue.stopping {
            return;
        }
        let (asks, next) = fetcher.due(&mut queue);
        if asks.is_empty() {
            drop(queue);
            drop(fetcher); // may be the last one: its drop takes the lock to say so
            work.sleep(next.map_or(IDLE, |at| at.saturating_duration_since(Instant::now())));
            continue;
        }
        drop(queue);
        for urgency in [Urgency::Demand, Urgency::Recorded, Urgency::Soon, Urgency::Fill] {
            let chunks: Vec<_> = asks
                .iter()
                .filter(|ask| ask.1 == urgency)
                .map(|ask| ask.0)
                .collect();
            if !chunks.is_empty() {
                fetcher.source.ask(&chunks, urgency);
            }
        }
    }
}

/// What the source talks to; it does not keep the fetcher alive.
struct Sink(Weak<Fetcher>);

impl ChunkSink for Sink {
    fn arrived(&self, chunk: ChunkId, what: Arrived) {
        if let Some(fetcher) = self.0.upgrade() {
            fetcher.arrived(chunk, what);
        }
    }

    fn failed(&self, chunk: ChunkId, failure: ChunkFailure) {
        if let Some(fetcher) = self.0.upgrade() {
            fetcher.failed(chunk, failure);
        }
    }
}

#[cfg(test)]
mod tests;
