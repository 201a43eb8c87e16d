//! One image in several places: a server that fails or lies is left for another, by all machines and by the next agent.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod wire;

use std::fs;
use std::sync::atomic::Ordering;

use runnel_snapshot::source::Arrived;
use wire::host::{Home, registry, registry_at_times, registry_of};
use wire::scripted::Reply;
use wire::{Stored, serve};

#[test]
fn an_image_is_read_where_it_was_named_last_and_elsewhere_when_that_fails() {
    let stored = Stored::new();
    let old = registry(&stored, |_, _| Reply::Close(Vec::new()));
    let (new, gone) = registry_at_times(&stored);
    let home = Home::new();
    let agent = home.start();
    let first = home.machine(&format!("{}/web", old.base())).unwrap();
    first.ask(&[3]);
    assert!(first.answer().1.unwrap_err().transient);
    assert!(agent.status().images[0].trouble.is_some());

    // Another machine, and the same image in a place that delivers.
    let second = home.machine(&format!("{}/web", new.base())).unwrap();
    first.ask(&[3]);
    assert_eq!(first.answer(), (3, Ok(Arrived::Data)));
    let status = agent.status();
    assert_eq!(status.images.len(), 1);
    assert_eq!(status.images[0].image, format!("{}/web", new.base()));
    let trouble = status.images[0].trouble.clone().unwrap();
    assert!(
        trouble.contains(&old.base()) && !trouble.contains(&new.base()),
        "{trouble}"
    );

    // Neither delivers: both are named, and it passes when one does again.
    gone.store(true, Ordering::SeqCst);
    second.ask(&[4]);
    let failure = second.answer().1.unwrap_err();
    assert!(failure.transient);
    for server in [&old, &new] {
        assert!(failure.reason.contains(&server.base()), "{failure}");
    }
    gone.store(false, Ordering::SeqCst);
    second.ask(&[4]);
    assert_eq!(second.answer(), (4, Ok(Arrived::Data)));
}

#[test]
fn wrong_bytes_of_one_place_are_read_again_in_another() {
    let stored = Stored::new();
    // Layers and indexes, all of them.
    let state = stored.open().manifest.state.digest;
    let damaged = registry_of(&stored, move |digest, request, bytes| {
        let flip = if *digest == state { 0 } else { 0x10 };
        let bytes: Vec<u8> = bytes.iter().map(|byte| byte ^ flip).collect();
        Reply::part(request, &bytes)
    });
    let sound = serve(&[&stored.path()]);
    let sound = format!("http://{}/web", sound.address());
    for newest_is_damaged in [false, true] {
        let home = Home::new();
        let agent = home.start();
        let machine = home.machine(&format!("{}/web", damaged.base())).unwrap();
        machine.ask(&[0, 4]);
        for (_, answer) in machine.answers(2) {
            assert!(!answer.unwrap_err().transient);
        }
        let _second = home.machine(&sound).unwrap();
        if newest_is_damaged {
            let _third = home.machine(&format!("{}/web", damaged.base())).unwrap();
        }
        machine.ask(&[0, 3, 4]);
        let data = |chunk| (chunk, Ok(Arrived::Data));
        assert_eq!(machine.answers(3), [data(0), data(3), data(4)]);
        assert!(machine.has(0, 1) && machine.has(3, 2));
        // Where right bytes came from is asked first from then on.
        assert_eq!(agent.status().images[0].image, sound);
    }
}

#[test]
fn a_new_place_of_a_pinned_image_is_used_too_and_waited_for_by_nobody() {
    let stored = Stored::new();
    let old = registry(&stored, |_, _| Reply::Close(Vec::new()));
    let new = serve(&[&stored.path()]);
    let home = Home::new();
    let _agent = home.start();
    let machine = home.machine(&format!("{}/web", old.base())).unwrap();
    let pinned = |base: &str| format!("{base}/web@{}", stored.manifest.digest);
    // Nobody is there, and the machine is none the worse for it.
    home.machine(&pinned("http://127.0.0.1:1")).unwrap();
    home.machine(&pinned(&format!("http://{}", new.address())))
        .unwrap();
    machine.gets(3);
}

#[test]
fn a_place_that_is_named_again_is_looked_at_again() {
    let stored = Stored::new();
    let (layer, sound) = stored.layer();
    let path = stored.path().join("blobs/sha256").join(layer.digest.hex());
    let put_in_place = |bytes: &[u8]| {
        let beside = path.with_extension("new");
        fs::write(&beside, bytes).unwrap();
        fs::rename(&beside, &path).unwrap();
    };
    put_in_place(&vec![0x5a; sound.len()]);
    let home = Home::new();
    let _agent = home.start();
    let image = stored.path();
    let image = image.to_str().unwrap();
    let machine = home.machine(image).unwrap();
    machine.ask(&[3]);
    assert!(!machine.answer().1.unwrap_err().transient);
    put_in_place(&sound);
    let _again = home.machine(image).unwrap();
    machine.ask(&[3]);
    assert_eq!(machine.answer(), (3, Ok(Arrived::Data)));
}

#[test]
fn the_next_agent_knows_the_places_that_the_last_one_knew() {
    let stored = Stored::new();
    let old = serve(&[&stored.path()]);
    let new = serve(&[&stored.path()]);
    let home = Home::new();
    let agent = home.start();
    let machine = home.machine(&format!("http://{}/web", old.address())).unwrap();
    let other = home.machine(&format!("http://{}/web", new.address())).unwrap();
    machine.ask(&[0]);
    assert_eq!(machine.answer(), (0, Ok(Arrived::Data)));
    // Where the machine began is gone, and so is the machine that knew of the other place.
    old.stop();
    agent.stop();
    drop(other);
    let agent = home.start();
    machine.gets(3);
    let status = agent.status();
    assert_eq!(
        status.images[0].image,
        format!("http://{}/web@{}", new.address(), stored.manifest.digest)
    );
}

#[test]
fn a_machine_that_comes_back_does_not_put_its_place_before_the_one_that_delivers() {
    let stored = Stored::new();
    let old = serve(&[&stored.path()]);
    let new = serve(&[&stored.path()]);
    let home = Home::new();
    let agent = home.start();
    let machine = home.machine(&format!("http://{}/web", old.address())).unwrap();
    let _other = home.machine(&format!("http://{}/web", new.address())).unwrap();
    agent.stop();
    let agent = home.start();
    machine.gets(3);
    let read_at = &agent.status().images[0].image;
    assert!(read_at.contains(&new.address().to_string()), "{read_at}");
}
