use std::collections::HashSet;
use std::io;
use std::path::Path;

use super::*;
use crate::source::PageFileLayout;
use crate::source::marks::MarkWriter;
use crate::source::model::{ModelSource, id};
use crate::units::ChunkSize;

const CHUNK: u64 = 64 << 10;

fn source(chunks: &[u64]) -> Arc<ModelSource> {
    let volume = |(number, chunks): (usize, &u64)| {
        let name = if number == 0 {
            VolumeName::Memory
        } else {
            VolumeName::Drive(format!("d{number}"))
        };
        let bytes = chunks * CHUNK;
        // Odd chunks hold data, even ones are zeros.
        let content = (0..bytes).map(|at| (at / CHUNK % 2) as u8).collect();
        (
            SourceVolume {
                name,
                bytes,
                chunk_size: ChunkSize::DEFAULT,
            },
            content,
        )
    };
    ModelSource::new(chunks.iter().enumerate().map(volume).collect())
}

fn quiet() -> FetcherSettings {
    FetcherSettings {
        neighbourhood_bytes: 0,
        fill: false,
        ..FetcherSettings::default()
    }
}

#[test]
fn a_demanded_chunk_is_asked_for_once_and_its_neighbours_behind_it() {
    let source = source(&[7]);
    let fetcher = Fetcher::start(
        source.clone(),
        FetcherSettings {
            neighbourhood_bytes: 4 * CHUNK,
            ..quiet()
        },
    )
    .unwrap();
    assert_eq!(fetcher.demand(id(0, 5)), None);
    assert_eq!(fetcher.demand(id(0, 5)), None);
    // The block's last chunk lies outside the volume.
    assert_eq!(
        source.asked(),
        [
            (id(0, 5), Urgency::Demand),
            (id(0, 6), Urgency::Soon),
            (id(0, 4), Urgency::Soon)
        ]
    );
}

#[test]
fn a_prefetched_chunk_that_becomes_demanded_is_lifted() {
    let source = source(&[8]);
    let fetcher = Fetcher::start(source.clone(), quiet()).unwrap();
    fetcher.prefetch(&[id(0, 3), id(0, 3), id(7, 0)]);
    fetcher.demand(id(0, 3));
    assert_eq!(
        source.asked(),
        [(id(0, 3), Urgency::Soon), (id(0, 3), Urgency::Demand)]
    );
}

#[test]
fn waiting_ends_with_the_arrival_and_tells_zeros_from_data() {
    let source = source(&[8]);
    let fetcher = Fetcher::start(source.clone(), quiet()).unwrap();
    let waiter = std::thread::spawn({
        let fetcher = fetcher.clone();
        move || (fetcher.wait(id(0, 1)).unwrap(), fetcher.wait(id(0, 2)).unwrap())
    });
    source.asked_until(|asked| asked.contains(&(id(0, 1), Urgency::Demand)));
    source.deliver(id(0, 1));
    source.asked_until(|asked| asked.contains(&(id(0, 2), Urgency::Demand)));
    source.deliver(id(0, 2));
    assert_eq!(waiter.join().unwrap(), (Arrived::Data, Arrived::Zero));
    assert_eq!(fetcher.demand(id(0, 1)), Some(Arrived::Data));
    let counters = fetcher.counters();
    assert_eq!(
        (
            counters.data_chunks,
            counters.zero_chunks,
            counters.demanded_chunks
        ),
        (1, 1, 2)
    );
}

#[test]
fn a_chunk_that_fails_for_too_long_stalls_with_the_reason_is_asked_for_again_and_the_stall_ends() {
    let source = source(&[8]);
    let settings = FetcherSettings {
        retry_min: Duration::from_millis(1),
        stall_after: Duration::ZERO,
        ..quiet()
    };
    let fetcher = Fetcher::start(source.clone(), settings).unwrap();
    fetcher.demand(id(0, 5));
    assert_eq!(source.asked().len(), 1);
    source.fail(id(0, 5), "the link is down", true);

    let stall = fetcher.stall().unwrap();
    assert_eq!(
        (stall.volume, stall.chunk, stall.chunks_waited_for),
        (VolumeName::Memory, ChunkIndex(5), 1)
    );
    assert_eq!(stall.reason, "the link is down");

    source.asked_until(|asked| asked.contains(&(id(0, 5), Urgency::Demand)));
    source.deliver(id(0, 5));
    assert_eq!(fetcher.stall(), None);
    assert_eq!(fetcher.waits().count, 1);
}

#[test]
fn an_outage_is_a_slow_page_until_its_time_is_up_and_damage_stalls_at_once() {
    let source = source(&[8]);
    let fetcher = Fetcher::start(source.clone(), quiet()).unwrap();
    fetcher.demand(id(0, 5));
    source.fail(id(0, 5), "the link is down", true);
    assert_eq!(fetcher.stall(), None);
    source.fail(id(0, 5), "the frame is damaged", false);
    let stall = fetcher.stall().unwrap();
    assert_eq!(stall.reason, "the frame is damaged");
    assert!(stall.needs_repair);
}

#[test]
fn a_failed_prefetch_stalls_nobody() {
    let source = source(&[8]);
    let fetcher = Fetcher::start(source.clone(), quiet()).unwrap();
    fetcher.prefetch(&[id(0, 5)]);
    source.fail(id(0, 5), "the link is down", true);
    assert_eq!(fetcher.stall(), None);
    // Demanded now, it is asked for at once, whatever the pause after the failure was to be.
    source.asked();
    fetcher.demand(id(0, 5));
    assert_eq!(source.asked(), [(id(0, 5), Urgency::Demand)]);
}

#[test]
fn a_silent_source_stalls_the_machine() {
    let source = source(&[8]);
    let settings = FetcherSettings {
        stall_after: Duration::ZERO,
        ..quiet()
    };
    let fetcher = Fetcher::start(source, settings).unwrap();
    fetcher.demand(id(0, 0));
    let stall = fetcher.stall().unwrap();
    assert_eq!(stall.reason, NOTHING_YET);
    assert!(!stall.needs_repair);
}

#[test]
fn who_gives_up_waiting_leaves_no_stall_behind() {
    let source = source(&[8]);
    let settings = FetcherSettings {
        stall_after: Duration::ZERO,
        ..quiet()
    };
    let fetcher = Fetcher::start(source.clone(), settings).unwrap();
    let give_up = || {
        assert!(!fetcher.stall().unwrap().holds_guest);
        true
    };
    assert!(fetcher.wait_unless(id(0, 5), &give_up).is_err(), "given up");
    assert_eq!(fetcher.stall(), None);
    assert!(fetcher.wait_unless(id(0, 5), &|| false).is_err(), "it stays away");
    assert_eq!(fetcher.stall(), None);
    // It still comes, as what was prefetched does, and is asked for first again once it is waited for.
    source.asked();
    fetcher.demand(id(0, 5));
    assert_eq!(source.asked(), [(id(0, 5), Urgency::Demand)]);
    source.deliver(id(0, 5));
    assert_eq!(fetcher.wait(id(0, 5)).unwrap(), Arrived::Data);
}

#[test]
fn who_gives_up_waiting_takes_no_other_wait_with_him() {
    let source = source(&[8]);
    let settings = FetcherSettings {
        stall_after: Duration::ZERO,
        ..quiet()
    };
    let fetcher = Fetcher::start(source, settings).unwrap();
    fetcher.demand(id(0, 5));
    assert!(fetcher.wait_unless(id(0, 5), &|| false).is_err());
    assert_eq!(fetcher.stall().unwrap().chunk, ChunkIndex(5));
    // Nor does a second one who gives up end the wait of a first one who has not.
    let both = || {
        assert!(fetcher.wait_unless(id(0, 6), &|| true).is_err());
        let stall = fetcher.stall().unwrap();
        assert_eq!((stall.chunks_waited_for, stall.holds_guest), (2, true));
        true
    };
    assert!(fetcher.wait_unless(id(0, 6), &both).is_err());
    assert_eq!(fetcher.stall().unwrap().chunks_waited_for, 1);
}

#[test]
fn fill_fetches_every_chunk_of_every_volume_within_its_window() {
    let source = source(&[5, 4]);
    let settings = FetcherSettings {
        fill: true,
        fill_window: 2,
        ..quiet()
    };
    let fetcher = Fetcher::start(source.clone(), settings).unwrap();
    fetcher.demand(id(0, 3));
    source.deliver(id(0, 3));
    source.asked();
    fetcher.start_fill();
    let mut under_way = source.asked_until(|asked| asked.len() == 2);
    let mut filled = Vec::new();
    while let Some((chunk, urgency)) = under_way.pop() {
        assert_eq!(urgency, Urgency::Fill);
        source.deliver(chunk);
        filled.push(chunk);
        let room = 2.min(8 - filled.len()) - under_way.len();
        under_way.extend(source.asked_until(|asked| asked.len() == room));
    }
    filled.sort();
    let expected: Vec<_> = (0..5)
        .filter(|c| *c != 3)
        .map(|c| id(0, c))
        .chain((0..4).map(|c| id(1, c)))
        .collect();
    assert_eq!(filled, expected);
    assert!(fetcher.counters().is_complete());
}

#[test]
fn a_filling_chunk_that_becomes_demanded_leaves_the_window_when_it_arrives() {
    let source = source(&[3]);
    let settings = FetcherSettings {
        fill: true,
        fill_window: 1,
        ..quiet()
    };
    let fetcher = Fetcher::start(source.clone(), settings).unwrap();
    fetcher.start_fill();
    source.asked_until(|asked| asked == [(id(0, 0), Urgency::Fill)]);
    fetcher.demand(id(0, 0));
    source.asked();
    source.deliver(id(0, 0));
    source.asked_until(|asked| asked == [(id(0, 1), Urgency::Fill)]);
}

#[test]
fn damaged_chunks_do_not_keep_the_fill_from_the_sound_ones_and_come_when_they_are_repaired() {
    let source = source(&[6]);
    let settings = FetcherSettings {
        fill: true,
        fill_window: 2,
        fill_pause: Duration::from_millis(1),
        ..quiet()
    };
    let fetcher = Fetcher::start(source.clone(), settings).unwrap();
    fetcher.start_fill();
    let mut sound = 0;
    let mut damaged: HashSet<_> = (0..4).map(|chunk| id(0, chunk)).collect();
    while sound < 2 {
        for (chunk, _) in source.asked_until(|asked| !asked.is_empty()) {
            if damaged.contains(&chunk) {
                source.fail(chunk, "the frame is damaged", false);
            } else {
                source.deliver(chunk);
                sound += 1;
            }
        }
    }
    // Each is asked for again, round after round; now it is there.
    while !damaged.is_empty() {
        for (chunk, _) in source.asked_until(|asked| !asked.is_empty()) {
            damaged.remove(&chunk);
            source.deliver(chunk);
        }
    }
    assert!(fetcher.counters().is_complete());
}

#[test]
fn what_is_lost_before_the_fill_begins_does_not_begin_it_nor_delay_it() {
    let source = source(&[2]);
    let settings = FetcherSettings {
        fill: true,
        ..quiet()
    };
    let fetcher = Fetcher::start(source.clone(), settings).unwrap();
    fetcher.prefetch(&[id(0, 1)]);
    source.fail(id(0, 1), "the frame is damaged", false);
    assert!(fetcher.work.lock().fill.next.is_none());
    assert_eq!(source.asked(), [(id(0, 1), Urgency::Soon)]);
    fetcher.start_fill();
    let asked = source.asked_until(|asked| asked.len() == 2);
    assert!(asked.iter().all(|(_, urgency)| *urgency == Urgency::Fill));
}

#[test]
fn where_nothing_can_be_had_for_good_the_fill_stands_and_what_is_demanded_is_asked_for() {
    let source = source(&[40]);
    let settings = FetcherSettings {
        fill: true,
        fill_window: 4,
        ..quiet()
    };
    let fetcher = Fetcher::start(source.clone(), settings).unwrap();
    fetcher.start_fill();
    let mut asked = 0;
    // As long as it goes on, and then for those that are under way yet.
    while fetcher.work.lock().fill.paused_until.is_none() || fetcher.work.lock().fill.under_way > 0 {
        for (chunk, _) in source.asked() {
            asked += 1;
            source.fail(chunk, "there is no such image", false);
        }
        std::thread::yield_now();
    }
    assert!((4..8).contains(&asked), "{asked}");
    assert!(
        fetcher.work.lock().pending.is_empty(),
        "what nobody waits for is forgotten"
    );

    fetcher.demand(id(0, 39));
    assert_eq!(source.asked(), [(id(0, 39), Urgency::Demand)]);
    source.fail(id(0, 39), "there is no such image", false);
    assert_eq!(fetcher.stall().unwrap().chunk, ChunkIndex(39));
}

#[test]
fn a_chunk_that_the_page_file_lost_is_fetched_again() {
    let source = source(&[8]);
    let fetcher = Fetcher::start(source.clone(), quiet()).unwrap();
    fetcher.demand(id(0, 1));
    source.deliver(id(0, 1));
    source.asked();
    fetcher.lost(id(0, 1));
    assert_eq!(fetcher.state(id(0, 1)), None);
    assert_eq!(source.asked(), [(id(0, 1), Urgency::Demand)]);
    source.deliver(id(0, 1));
    assert_eq!(fetcher.counters().data_chunks, 1);
}

#[test]
fn a_write_without_room_stalls_the_machine_until_there_is_some() {
    let source = source(&[8, 4]);
    let fetcher = Fetcher::start(source, quiet()).unwrap();
    let no_room = || io::Error::from(io::ErrorKind::StorageFull);
    let mut attempts = 0;
    let write = || {
        attempts += 1;
        if attempts == 1 {
            assert_eq!(fetcher.stall(), None);
            return Err(no_room());
        }
        let stall = fetcher.stall().unwrap();
        assert_eq!(
            (stall.volume, stall.chunk),
            (VolumeName::Drive("d1".into()), ChunkIndex(2))
        );
        assert!(stall.reason.ends_with("make room in /disks"), "{}", stall.reason);
        assert!(stall.holds_guest);
        if attempts == 3 { Ok(()) } else { Err(no_room()) }
    };
    fetcher.keep(id(1, 2), Path::new("/disks"), write).unwrap();
    assert_eq!(fetcher.stall(), None);

    let broken = || Err(io::ErrorKind::PermissionDenied.into());
    assert!(fetcher.keep(id(1, 2), Path::new("/disks"), broken).is_err());
    let stopped = || {
        fetcher.stop();
        Err(no_room())
    };
    assert!(fetcher.keep(id(1, 2), Path::new("/disks"), stopped).is_err());
    assert_eq!(fetcher.stall(), None);
}

#[test]
fn stopping_ends_every_wait() {
    let source = source(&[8]);
    let fetcher = Fetcher::start(source.clone(), quiet()).unwrap();
    let waiter = std::thread::spawn({
        let fetcher = fetcher.clone();
        move || fetcher.wait(id(0, 1))
    });
    source.asked_until(|asked| !asked.is_empty());
    fetcher.stop();
    assert!(waiter.join().unwrap().is_err());
    assert!(fetcher.wait(id(0, 99)).is_err());
}

#[test]
fn who_gives_up_a_reading_of_what_was_taken_out_leaves_no_stall_behind() {
    let source = source(&[8]);
    let chunks = PageFileLayout {
        volume_bytes: 8 * CHUNK,
        chunk_size: ChunkSize::DEFAULT,
    };
    let file = source.page_file(VolumeId(0));
    let marks = MarkWriter::new(&file, chunks).unwrap();
    let settings = FetcherSettings {
        stall_after: Duration::ZERO,
        ..quiet()
    };
    let fetcher = Fetcher::start(source.clone(), settings).unwrap();
    fetcher.demand(id(0, 5));
    source.deliver(id(0, 5));
    let read = || fetcher.read_held(id(0, 5), || fetcher.wait_unless(id(0, 5), &|| false), || Ok(()));
    assert_eq!(read().unwrap(), Arrived::Data);

    marks.mark_out(&file, ChunkIndex(5)).unwrap();
    assert!(read().is_err(), "it does not come again");
    assert_eq!(fetcher.state(id(0, 5)), None);
    assert_eq!(fetcher.stall(), None);
    let cancelled = fetcher.read_held(id(0, 5), || fetcher.wait_unless(id(0, 5), &|| true), || Ok(()));
    assert!(cancelled.is_err());
    assert_eq!(fetcher.stall(), None);

    marks.mark_in(&file, ChunkIndex(5)).unwrap();
    source.deliver(id(0, 5));
    assert_eq!(read().unwrap(), Arrived::Data);
}
