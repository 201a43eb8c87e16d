//! Captures through the whole pipeline: what comes out is the volume, for Runnel and for stock zstd; what fails
//! leaves nothing.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod fixture;

use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use proptest::prelude::*;
use runnel_snapshot::capture::content::{FileContent, Found};
use runnel_snapshot::capture::progress::Stage;
use runnel_snapshot::capture::raw::{RawError, RawFile, publish, write_raw, write_raw_pages};
use runnel_snapshot::capture::{
    CaptureError, CaptureSettings, Captured, Content, Job, Progress, VolumeSource,
};
use runnel_snapshot::image::Image;
use runnel_snapshot::image::below::BelowImage;
use runnel_snapshot::image::layout::Layout;
use runnel_snapshot::image::reference::Wanted;
use runnel_snapshot::pager::PageSet;
use runnel_snapshot::state::MachineState;
use runnel_snapshot::units::{ByteRange, ChunkIndex, ChunkSize, PageIndex};
use runnel_snapshot::volume::VolumeName;

use fixture::{CHUNK, chunk_of, read_volume};

fn state() -> MachineState {
    MachineState::new(1, Vec::new())
}

fn content(content: impl Content + 'static) -> VolumeSource {
    VolumeSource::Content(Arc::new(content))
}

fn drive(id: &str) -> VolumeName {
    VolumeName::Drive(id.into())
}

fn capture(target: &Path, volumes: Vec<(VolumeName, VolumeSource)>) -> Result<Captured, CaptureError> {
    Job::new(
        CaptureSettings {
            compressors: 3,
            ..CaptureSettings::default()
        },
        volumes,
    )?
    .run(target, state())
}

fn open(target: &Path) -> Image {
    Image::open_directory(target, &Wanted::Only).unwrap()
}

/// Chunks of data, zeros and data that does not compress, in an order that gives runs of several lengths.
fn mixed(bytes: usize) -> Vec<u8> {
    let mut plain = vec![0; bytes];
    let mut seed = 1_u64;
    for (number, chunk) in plain.chunks_mut(CHUNK).enumerate() {
        match number * 7 % 11 {
            0..3 => {}
            3..6 => chunk.fill_with(|| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (seed >> 56) as u8
            }),
            _ => chunk.copy_from_slice(&chunk_of(number as u8)[..chunk.len()]),
        }
    }
    plain
}

#[test]
fn volumes_of_any_length_come_back_byte_for_byte() {
    let folder = tempfile::tempdir().unwrap();
    let lengths = [1, 511, 512, CHUNK - 1, CHUNK, CHUNK + 1, 40 * CHUNK + 512];
    let volumes: Vec<Vec<u8>> = lengths.iter().map(|len| mixed(*len)).collect();
    let named = volumes
        .iter()
        .enumerate()
        .map(|(n, plain)| (drive(&n.to_string()), content(plain.clone())));
    capture(&folder.path().join("image"), named.collect()).unwrap();

    let image = open(&folder.path().join("image"));
    assert_eq!(image.state().unwrap(), state());
    for (number, plain) in volumes.iter().enumerate() {
        assert!(
            read_volume(&image, &drive(&number.to_string())) == *plain,
            "volume of {} bytes",
            plain.len()
        );
    }
}

/// What stock `zstd -dc` makes of a file, read piece by piece.
fn stock_zstd(layer: &Path, mut each: impl FnMut(&[u8])) {
    let mut zstd = Command::new("zstd")
        .args(["-dc", "--"])
        .arg(layer)
        .stdout(Stdio::piped())
        .spawn()
        .expect("the zstd program is needed: apt-get install zstd");
    let mut output = zstd.stdout.take().unwrap();
    let mut piece = vec![0; 1 << 20];
    loop {
        match output.read(&mut piece).unwrap() {
            0 => break,
            len => each(&piece[..len]),
        }
    }
    assert!(zstd.wait().unwrap().success());
}

#[test]
fn stock_zstd_of_a_layer_is_the_volume_even_with_more_than_a_gib_of_zeros() {
    let folder = tempfile::tempdir().unwrap();
    // Data, 1 GiB and a bit of hole, data, a hole of an odd length at the end.
    let bytes = (1 << 30) + 5 * CHUNK as u64 + 777;
    let memory = File::create_new(folder.path().join("memory")).unwrap();
    memory.set_len(bytes).unwrap();
    let late = bytes - 2 * CHUNK as u64;
    memory.write_all_at(&chunk_of(1), 0).unwrap();
    memory.write_all_at(&chunk_of(2), late).unwrap();
    let file = File::open(folder.path().join("memory")).unwrap();
    let target = folder.path().join("image");
    let captured = capture(
        &target,
        vec![(
            VolumeName::Memory,
            content(FileContent::new(file, bytes).unwrap()),
        )],
    )
    .unwrap();

    let layer = captured.volumes[0].layers[0];
    assert!(layer.bytes < 200 << 10, "zeros cost nothing: {layer}");
    let mut expected = io::BufReader::new(File::open(folder.path().join("memory")).unwrap());
    let mut at = 0;
    let mut wanted = vec![0; 1 << 20];
    stock_zstd(&target.join("blobs/sha256").join(layer.digest.hex()), |piece| {
        let wanted = &mut wanted[..piece.len()];
        expected.read_exact(wanted).unwrap();
        assert!(
            piece == wanted,
            "differs in the {} bytes from {at} on",
            piece.len()
        );
        at += piece.len() as u64;
    });
    assert_eq!(at, bytes);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn whatever_was_captured_is_read_back(
        runs in proptest::collection::vec((0_u8..4, 1_usize..200_000), 1..12),
        log2_chunk in 14_u32..22,
        compressors in 1_usize..4,
    ) {
        let mut plain = Vec::new();
        for (kind, len) in runs {
            match kind {
                0 | 1 => plain.resize(plain.len() + len, 0),
                kind => plain.extend(mixed(len).iter().map(|byte| byte ^ kind)),
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("image");
        let chunk_size = ChunkSize::new(1 << log2_chunk).unwrap();
        let settings = CaptureSettings { chunk_size, compressors, ..CaptureSettings::default() };
        let captured = Job::new(settings, vec![(VolumeName::Memory, content(plain.clone()))])
            .unwrap()
            .run(&target, state())
            .unwrap();
        prop_assert!(read_volume(&open(&target), &VolumeName::Memory) == plain);
        let mut stock = Vec::new();
        let layer = captured.volumes[0].layers[0].digest.hex();
        stock_zstd(&target.join("blobs/sha256").join(layer), |piece| stock.extend_from_slice(piece));
        prop_assert!(stock == plain);
    }
}

#[test]
fn the_state_carries_the_places_of_the_first_chunks_that_are_not_zero() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("image");
    let mut plain = vec![0; 6 * CHUNK];
    plain[4 * CHUNK..5 * CHUNK].copy_from_slice(&chunk_of(4));
    plain[..CHUNK].copy_from_slice(&chunk_of(9));
    let first = [4, 1, 4, 0, 99]
        .map(|chunk| (VolumeName::Memory, ChunkIndex(chunk)))
        .to_vec();
    Job::new(
        CaptureSettings::default(),
        vec![(VolumeName::Memory, content(plain))],
    )
    .unwrap()
    .with_first_chunks(first)
    .run(&target, state())
    .unwrap();

    let image = open(&target);
    let index = image.index(&image.manifest.volumes[0]);
    let listed = image.state().unwrap().first_chunks;
    assert_eq!(
        listed.iter().map(|first| first.chunk.0).collect::<Vec<_>>(),
        [4, 0]
    );
    for first in listed {
        assert_eq!(index.entry(first.chunk).unwrap(), first.entry);
    }
}

#[test]
fn a_volume_that_did_not_change_is_taken_over_without_being_written_again() {
    let folder = tempfile::tempdir().unwrap();
    let parent_path = folder.path().join("parent");
    let plain = mixed(20 * CHUNK);
    let parent = capture(&parent_path, vec![(drive("base"), content(plain.clone()))]).unwrap();

    let target = folder.path().join("child");
    let layout = Arc::new(Layout::open(&parent_path).unwrap());
    let volume = open(&parent_path).manifest.volumes[0].clone();
    let layer = volume.layers[0];
    let volumes = vec![
        (VolumeName::Memory, content(vec![1; CHUNK])),
        (
            drive("other_name"),
            VolumeSource::Unchanged {
                below: BelowImage::whole(layout),
                volume,
            },
        ),
    ];
    Job::new(CaptureSettings::default(), volumes)
        .unwrap()
        .with_parent(parent.manifest.digest)
        .with_first_chunks(vec![(drive("other_name"), ChunkIndex(1))])
        .run(&target, state())
        .unwrap();

    let child = open(&target);
    assert_eq!(child.manifest.parent, Some(parent.manifest.digest));
    assert!(read_volume(&child, &drive("other_name")) == plain);
    assert_eq!(child.state().unwrap().first_chunks.len(), 1);
    let blob = |image: &Path| fs::metadata(image.join("blobs/sha256").join(layer.digest.hex())).unwrap();
    assert_eq!(
        blob(&target).ino(),
        blob(&parent_path).ino(),
        "linked, not copied"
    );
    // Complete by itself.
    fs::remove_dir_all(&parent_path).unwrap();
    assert!(read_volume(&open(&target), &drive("other_name")) == plain);
}

/// Fails, cancels or panics when a certain byte is read.
struct Trap {
    bytes: u64,
    at: u64,
    spring: Box<dyn Fn() -> io::Result<()> + Send + Sync>,
}

impl Content for Trap {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn next_data(&self, from: u64) -> io::Result<Option<ByteRange>> {
        Ok((from < self.bytes).then(|| ByteRange {
            start: from,
            len: self.bytes - from,
        }))
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Found> {
        if (offset..offset + into.len() as u64).contains(&self.at) {
            (self.spring)()?;
        }
        into.fill(offset as u8 | 1);
        Ok(Found::Data)
    }
}

fn trap(spring: impl Fn() -> io::Result<()> + Send + Sync + 'static) -> Trap {
    Trap {
        bytes: 64 << 20,
        at: 40 << 20,
        spring: Box::new(spring),
    }
}

fn assert_empty(folder: &Path) {
    let left: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

#[test]
fn content_that_cannot_be_read_ends_the_capture_by_name_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let broken = trap(|| Err(io::Error::other("bad sector")));
    let volumes = vec![
        (VolumeName::Memory, content(vec![1; CHUNK])),
        (drive("data"), content(broken)),
    ];
    let error = capture(&folder.path().join("image"), volumes).unwrap_err();
    assert!(
        matches!(&error, CaptureError::Read { volume, .. } if *volume == drive("data")),
        "{error}"
    );
    assert_empty(folder.path());
}

#[test]
fn a_panic_of_the_content_is_passed_on_and_nothing_hangs_or_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("image");
    let volumes = vec![(VolumeName::Memory, content(trap(|| panic!("on purpose"))))];
    std::thread::spawn(move || capture(&target, volumes))
        .join()
        .unwrap_err();
    assert_empty(folder.path());
}

#[test]
fn a_capture_is_watched_and_cancelled_from_another_thread() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("image");
    // Stops in the middle until the watcher has seen it there.
    let (reached, watcher) = std::sync::mpsc::channel();
    let (go_on, wait) = std::sync::mpsc::channel::<()>();
    let wait = std::sync::Mutex::new(wait);
    let trap = trap(move || {
        reached.send(()).unwrap();
        let _ = wait.lock().unwrap().recv();
        Ok(())
    });
    let job = Job::new(
        CaptureSettings::default(),
        vec![(VolumeName::Memory, content(trap))],
    )
    .unwrap();
    let progress = job.progress();
    let capture = std::thread::spawn(move || job.run(&target, state()));
    watcher.recv().unwrap();
    let seen = progress.volumes();
    assert_eq!(
        (&seen[0].name, seen[0].bytes_total),
        (&VolumeName::Memory, 64 << 20)
    );
    assert!(
        seen[0].bytes_done <= 40 << 20,
        "what is behind the trap cannot be done: {seen:?}"
    );
    assert_eq!(progress.stage(), Stage::Copying);
    progress.cancel();
    drop(go_on);
    assert!(matches!(capture.join().unwrap(), Err(CaptureError::Cancelled)));
    assert_empty(folder.path());
}

#[test]
fn progress_ends_at_the_whole() {
    let folder = tempfile::tempdir().unwrap();
    let plain = mixed(30 * CHUNK + 5);
    let job = Job::new(
        CaptureSettings::default(),
        vec![(VolumeName::Memory, content(plain.clone()))],
    )
    .unwrap();
    let progress = job.progress();
    let captured = job.run(&folder.path().join("image"), state()).unwrap();
    let volume = &progress.volumes()[0];
    assert_eq!(
        (volume.bytes_done, volume.bytes_total),
        (plain.len() as u64, plain.len() as u64)
    );
    assert_eq!(volume.bytes_stored, captured.volumes[0].stored_bytes());
    assert_eq!(progress.stage(), Stage::Published);
}

#[test]
fn two_volumes_of_one_name_are_refused() {
    let twice = || (VolumeName::Memory, content(vec![1; 1]));
    let error = Job::new(CaptureSettings::default(), vec![twice(), twice()])
        .map(|_| ())
        .unwrap_err();
    assert!(matches!(error, CaptureError::Twice(VolumeName::Memory)));
}

#[test]
fn a_raw_copy_is_the_volume_sparse_and_replaces_the_old_file_whole() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("mem");
    fs::write(&target, "the old one").unwrap();
    let old = File::open(&target).unwrap();
    let mut plain = mixed(20 * CHUNK + 512);
    plain.resize(plain.len() + 400 * CHUNK, 0);
    let progress = Progress::new([(VolumeName::Memory, plain.len() as u64)]);
    let memory = write_raw(&plain, &target, &CaptureSettings::default(), &progress).unwrap();
    assert_eq!(fs::read_to_string(&target).unwrap(), "the old one");
    let state = raw_state(&folder.path().join("state"));
    publish(state, memory, &progress).unwrap();
    assert!(fs::read(&target).unwrap() == plain);
    assert!(fs::metadata(&target).unwrap().blocks() * 512 <= 21 * CHUNK as u64);
    assert_eq!(progress.stage(), Stage::Published);
    assert_eq!(io::read_to_string(old).unwrap(), "the old one");
}

#[test]
fn a_raw_file_of_some_pages_has_holes_elsewhere_or_what_was_there_before() {
    let folder = tempfile::tempdir().unwrap();
    let (target, state) = (folder.path().join("mem"), folder.path().join("state"));
    let pages = 300;
    let plain: Vec<u8> = (0..pages * 4096).map(|at| (at / 4096 % 200 + 1) as u8).collect();
    let mut now = plain.clone();
    now[7 * 4096..9 * 4096].fill(0);
    now[100 * 4096..200 * 4096].fill(255);
    let mut changed = PageSet::new(pages as u64);
    changed.insert_run(PageIndex(7), 2);
    changed.insert_run(PageIndex(100), 100);
    let write = || {
        let progress = Progress::new([(VolumeName::Memory, now.len() as u64)]);
        let file = write_raw_pages(&now, &changed, &target, &CaptureSettings::default(), &progress).unwrap();
        assert_eq!(progress.volumes()[0].bytes_done, now.len() as u64);
        publish(raw_state(&state), file, &progress).unwrap();
    };
    let data = |file: &File, from| rustix::fs::seek(file, rustix::fs::SeekFrom::Data(from)).ok();
    let hole = |file: &File, from| rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(from)).unwrap();

    write();
    let file = File::open(&target).unwrap();
    assert_eq!(file.metadata().unwrap().len(), now.len() as u64);
    // Pages that are zeros are data: whoever lays the file over another takes them over.
    let runs = [(0, 7, 9), (9, 100, 200)];
    for (from, start, end) in runs {
        assert_eq!(data(&file, from * 4096), Some(start * 4096));
        assert_eq!(hole(&file, start * 4096), end * 4096);
    }
    assert_eq!(data(&file, 200 * 4096), None);
    let read = fs::read(&target).unwrap();
    assert!(read[100 * 4096..200 * 4096] == now[100 * 4096..200 * 4096]);

    // A file of another length is nothing to go by, and one of this length is brought up to date.
    fs::write(&target, &plain[..4096]).unwrap();
    write();
    assert_eq!(data(&File::open(&target).unwrap(), 0), Some(7 * 4096));
    fs::write(&target, &plain).unwrap();
    write();
    assert!(fs::read(&target).unwrap() == now);
}

/// A new state for `target`, not published.
fn raw_state(target: &Path) -> RawFile {
    let state = b"the new state".to_vec();
    let progress = Progress::new([(VolumeName::Memory, state.len() as u64)]);
    write_raw(&state, target, &CaptureSettings::default(), &progress).unwrap()
}

#[test]
fn state_and_memory_are_replaced_together_or_stay() {
    let folder = tempfile::tempdir().unwrap();
    let (state, memory) = (folder.path().join("state"), folder.path().join("mem"));
    fs::write(&state, "the old state").unwrap();
    let progress = Progress::new([(VolumeName::Memory, 5)]);
    let write = || {
        let new = b"bytes".to_vec();
        let new = write_raw(&new, &memory, &CaptureSettings::default(), &progress).unwrap();
        publish(raw_state(&state), new, &progress)
    };
    // Something that appears while memory is copied.
    let late = b"bytes".to_vec();
    let late = write_raw(&late, &memory, &CaptureSettings::default(), &progress).unwrap();
    fs::create_dir(&memory).unwrap();
    let error = publish(raw_state(&state), late, &progress).unwrap_err();
    assert!(
        matches!(&error, RawError::NoFile(path) if *path == memory),
        "{error}"
    );
    assert_eq!(fs::read_to_string(&state).unwrap(), "the old state");
    assert_eq!(
        fs::read_dir(folder.path()).unwrap().count(),
        2,
        "and nothing is left over"
    );
    fs::remove_dir(&memory).unwrap();

    // Whatever is there already and is no file is not touched.
    let precious = memory.join("precious");
    fs::create_dir(&memory).unwrap();
    fs::write(&precious, "").unwrap();
    for target in [&memory, Path::new("/dev/null")] {
        let error = write_raw(&vec![1_u8; 8], target, &CaptureSettings::default(), &progress).unwrap_err();
        assert!(
            matches!(&error, RawError::NoFile(path) if path == target),
            "{error}"
        );
    }
    assert!(precious.exists());
    fs::remove_dir_all(&memory).unwrap();

    // Nor is the drive of a machine, which has it locked.
    let drive = folder.path().join("drive");
    fs::write(&drive, "a file system").unwrap();
    let locked = fs::File::open(&drive).unwrap();
    rustix::fs::flock(&locked, rustix::fs::FlockOperation::LockShared).unwrap();
    let error = write_raw(&vec![1_u8; 8], &drive, &CaptureSettings::default(), &progress).unwrap_err();
    assert!(
        matches!(&error, RawError::InUse(path) if *path == drive),
        "{error}"
    );
    assert_eq!(fs::read_to_string(&drive).unwrap(), "a file system");
    fs::remove_file(&drive).unwrap();

    write().unwrap();
    assert_eq!(fs::read_to_string(&state).unwrap(), "the new state");
    assert_eq!(fs::read(&memory).unwrap(), b"bytes");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
}

#[test]
fn a_raw_copy_that_fails_leaves_what_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("mem");
    fs::write(&target, "the old one").unwrap();
    fs::write(folder.path().join(".mem.partial-1-1"), "of a killed writer").unwrap();
    let progress = Progress::new([(VolumeName::Memory, 64 << 20)]);
    let broken = trap(|| Err(io::Error::other("bad sector")));
    let error = write_raw(&broken, &target, &CaptureSettings::default(), &progress).unwrap_err();
    assert!(matches!(error, RawError::Read { .. }));
    assert_eq!(fs::read_to_string(&target).unwrap(), "the old one");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// Runs `test` where `folder` is a file system of 2 MiB; false if this user may not mount one.
fn on_a_small_file_system(folder: &Path, test: impl FnOnce() + Send) -> bool {
    let name = |text: &str| std::ffi::CString::new(text).unwrap();
    let folder = std::ffi::CString::new(folder.to_str().unwrap()).unwrap();
    // A thread with mounts of its own, so that nobody else sees this one and it goes with the thread.
    std::thread::scope(|scope| {
        let run = scope.spawn(|| {
            // SAFETY: affects this thread alone; no memory is involved.
            if unsafe { libc::unshare(libc::CLONE_NEWNS | libc::CLONE_FS) } != 0 {
                return false;
            }
            let (none, root, tmpfs, size) = (name("none"), name("/"), name("tmpfs"), name("size=2m"));
            let private = libc::MS_REC | libc::MS_PRIVATE;
            // SAFETY: all strings are NUL-terminated and live until the call returns; the data may be null.
            let made = unsafe {
                libc::mount(
                    none.as_ptr(),
                    root.as_ptr(),
                    none.as_ptr(),
                    private,
                    std::ptr::null(),
                )
            };
            assert_eq!(made, 0, "{}", io::Error::last_os_error());
            // SAFETY: as above; tmpfs takes its options as a string.
            let made = unsafe {
                libc::mount(
                    none.as_ptr(),
                    folder.as_ptr(),
                    tmpfs.as_ptr(),
                    0,
                    size.as_ptr().cast(),
                )
            };
            assert_eq!(made, 0, "{}", io::Error::last_os_error());
            test();
            true
        });
        run.join().unwrap()
    })
}

#[test]
fn a_full_disk_is_named_and_leaves_no_image() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("image");
    let ran = on_a_small_file_system(folder.path(), || {
        // Does not compress, and is larger than the file system.
        let noise = (0..600_000_u32)
            .flat_map(|n| *blake3::hash(&n.to_le_bytes()).as_bytes())
            .take(8 << 20)
            .collect();
        let noise: Vec<u8> = noise;
        let error = capture(&target, vec![(VolumeName::Memory, content(noise.clone()))]).unwrap_err();
        let text = format!("{error}: {}", std::error::Error::source(&error).unwrap());
        assert!(
            text.contains(folder.path().to_str().unwrap()) && text.contains("No space"),
            "{text}"
        );
        assert_empty(folder.path());

        let progress = Progress::new([(VolumeName::Memory, noise.len() as u64)]);
        let error = write_raw(&noise, &target, &CaptureSettings::default(), &progress).unwrap_err();
        assert!(matches!(error, RawError::Write { .. }), "{error}");
        assert_empty(folder.path());
        // The disk is usable again.
        capture(&target, vec![(VolumeName::Memory, content(vec![1; 1 << 20]))]).unwrap();
    });
    if !ran {
        assert!(
            std::env::var_os("RUNNEL_LAB").is_none_or(|lab| lab != "full"),
            "a full disk needs root to be tested"
        );
        writeln!(std::io::stderr(), "skipped: a full disk needs root to be tested").unwrap(); // past the test harness, which keeps back what is printed
    }
}

/// Set for the process that is to be killed: where it captures to, and at which byte it stops for ever.
const VICTIM: &str = "RUNNEL_TEST_VICTIM";

/// Captures and stops at a byte, which it says on standard output.
fn be_killed(victim: &str) {
    let (at, target) = victim.split_once(' ').unwrap();
    let stop = || {
        println!("reached");
        loop {
            std::thread::park();
        }
    };
    let trap = Trap {
        bytes: 64 << 20,
        at: at.parse().unwrap(),
        spring: Box::new(stop),
    };
    capture(Path::new(target), vec![(VolumeName::Memory, content(trap))]).unwrap();
}

#[test]
fn a_killed_capture_leaves_no_image_and_nothing_in_the_way_of_the_next() {
    if let Ok(victim) = std::env::var(VICTIM) {
        return be_killed(&victim);
    }
    let test = "a_killed_capture_leaves_no_image_and_nothing_in_the_way_of_the_next";
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("image");
    // At the first byte, in the middle, when almost everything is written.
    for at in [0_u64, 32 << 20, (64 << 20) - 1] {
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env(VICTIM, format!("{at} {}", target.display()))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = io::BufReader::new(victim.stdout.take().unwrap());
        assert!(io::BufRead::lines(output).any(|line| line.unwrap().contains("reached")));
        victim.kill().unwrap();
        victim.wait().unwrap();
        assert!(!target.exists());
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            1,
            "the killed one could not clean up"
        );

        capture(&target, vec![(VolumeName::Memory, content(mixed(3 * CHUNK)))]).unwrap();
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            1,
            "the next one did"
        );
        assert!(read_volume(&open(&target), &VolumeName::Memory) == mixed(3 * CHUNK));
        fs::remove_dir_all(&target).unwrap();
    }
}
