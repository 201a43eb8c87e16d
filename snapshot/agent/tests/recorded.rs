//! What was recorded with an image: the agent fetches it by itself, in few requests, and whoever waits for something else
//! does not wait for it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod wire;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use runnel_snapshot::source::Arrived;
use wire::Stored;
use wire::fixture::Part::{Data, Zeros};
use wire::fixture::chunk_of;
use wire::host::{Home, LONG, registry_of};
use wire::scripted::Reply;

/// As many as are in hand at once, and as many again.
const CHUNKS: u64 = 200;

/// Those that are recorded, the last of them first.
const RECORDED: std::ops::Range<u64> = 2..CHUNKS - 10;

/// An image of so many chunks.
fn stored() -> Stored {
    let part = |number: u64| match number {
        1 => Zeros(1),
        _ => Data(chunk_of(number as u8 + 1)),
    };
    let parts: Vec<_> = (0..CHUNKS).map(part).collect();
    Stored::of(&parts).recorded(&RECORDED.rev().collect::<Vec<_>>())
}

#[test]
fn what_was_recorded_comes_unasked_in_its_order_and_in_few_requests() {
    let stored = stored();
    let layers = stored.open().manifest.volumes[0].layers.clone();
    let server = registry_of(&stored, |_, request, bytes| Reply::part(request, bytes));
    let home = Home::new();
    let _agent = home.start();
    let image = format!("{}/web", server.base());
    let machine = home.machine(&image).unwrap();
    let recorded = RECORDED.count();
    let answers = machine.answers(recorded);
    let chunks: BTreeSet<u64> = answers.iter().map(|answer| answer.0).collect();
    assert_eq!(chunks, RECORDED.collect());
    assert!(answers.iter().all(|answer| answer.1 == Ok(Arrived::Data)));
    assert!(machine.has(2, 3) && machine.has(CHUNKS - 11, (CHUNKS - 10) as u8));

    let of_layer = |number: usize| {
        let name = layers[number].digest.to_string();
        let requests = server.requests().into_iter();
        let ranges = requests.filter(|request| request.target.ends_with(&name));
        ranges.map(|request| request.range().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(of_layer(0), [], "nobody asked for what is there alone");
    let mut ranges = of_layer(1);
    assert!(
        ranges.len() <= recorded / 4,
        "{} requests for {recorded} chunks",
        ranges.len()
    );
    ranges.sort_unstable();
    assert_eq!(ranges[0].0, 0);
    assert!(
        ranges.windows(2).all(|pair| pair[0].1 + 1 == pair[1].0),
        "each byte once: {ranges:?}"
    );

    // The next machine is told of all at once, and nothing is fetched for it.
    let requests = server.requests().len();
    let next = home.machine(&image).unwrap();
    assert_eq!(next.answers(recorded).len(), recorded);
    let more = server.requests().split_off(requests);
    assert!(
        more.iter().all(|request| request.target.contains("/manifests/")),
        "{more:?}"
    );
}

/// A door before which requests wait, and are counted.
#[derive(Default)]
struct Door {
    is_open: Mutex<bool>,
    opened: Condvar,
    waiting: AtomicUsize,
}

impl Door {
    /// Waits, if it is one of the first `held`.
    fn pass(&self, held: usize) {
        if self.waiting.fetch_add(1, Ordering::SeqCst) >= held {
            return;
        }
        let open = self.is_open.lock().unwrap();
        drop(self.opened.wait_while(open, |open| !*open).unwrap());
    }

    fn open(&self) {
        *self.is_open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

#[test]
fn who_waits_for_a_chunk_overtakes_what_was_recorded() {
    /// Half of the agent's workers.
    const HANDS: usize = 10;
    let stored = stored();
    let hot = stored.open().manifest.volumes[0].layers[1].digest;
    let door = Arc::new(Door::default());
    let before = Arc::clone(&door);
    // What comes first of the recorded chunks does not come at all, as if the link were slow.
    let server = registry_of(&stored, move |digest, request, bytes| {
        if *digest == hot {
            before.pass(HANDS);
        }
        Reply::part(request, bytes)
    });
    let home = Home::new();
    let _agent = home.start();
    let machine = home.machine(&format!("{}/web", server.base())).unwrap();
    let until = Instant::now() + LONG;
    while door.waiting.load(Ordering::SeqCst) < HANDS {
        assert!(Instant::now() < until, "the recorded chunks are not asked for");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    // One that nobody recorded, and one whose turn has not come.
    machine.ask(&[CHUNKS - 1]);
    assert_eq!(machine.answer(), (CHUNKS - 1, Ok(Arrived::Data)));
    machine.ask(&[2]);
    assert_eq!(machine.answer(), (2, Ok(Arrived::Data)));
    assert_eq!(
        door.waiting.load(Ordering::SeqCst),
        HANDS + 1,
        "for one chunk alone"
    );
    door.open();
    let rest = machine.answers(RECORDED.count() - 1);
    assert!(rest.iter().all(|answer| answer.1 == Ok(Arrived::Data)));
}
