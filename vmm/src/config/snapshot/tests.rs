use super::*;
use crate::config::Otherwise;

fn create(json: &str) -> Result<CreateSnapshot, SnapshotError> {
    serde_json::from_str::<CreateSnapshotBody>(json)
        .unwrap()
        .try_into()
}

fn load(json: &str) -> Result<LoadSnapshot, SnapshotError> {
    serde_json::from_str::<LoadSnapshotBody>(json).unwrap().try_into()
}

#[test]
fn firecrackers_two_files_are_taken_as_its_clients_send_them() {
    let two = create(r#"{"snapshot_type": "Full", "snapshot_path": "s", "mem_file_path": "m"}"#).unwrap();
    assert_eq!(
        two.save_as,
        SaveAs::TwoFiles {
            state: "s".into(),
            memory: "m".into()
        }
    );

    assert_eq!(two.kind, SnapshotType::Full);
    let diff = create(r#"{"snapshot_type": "Diff", "snapshot_path": "s", "mem_file_path": "m"}"#).unwrap();
    assert_eq!((diff.kind, &diff.save_as), (SnapshotType::Diff, &two.save_as));

    let from = LoadFrom::TwoFiles {
        state: "s".into(),
        memory: "m".into(),
    };
    let backend = r#"{"snapshot_path": "s", "mem_backend": {"backend_type": "File", "backend_path": "m"}}"#;
    let loaded = load(backend).unwrap();
    assert_eq!(loaded.from, from);
    assert!(!loaded.resume && !loaded.track_dirty_pages && !loaded.clock_realtime);

    let old: LoadSnapshotBody = serde_json::from_str(
        r#"{"snapshot_path": "s", "mem_file_path": "m", "enable_diff_snapshots": true}"#,
    )
    .unwrap();
    assert!(old.deprecation().is_some());
    let old = LoadSnapshot::try_from(old).unwrap();
    assert_eq!(old.from, from);
    assert!(old.track_dirty_pages);
}

#[test]
fn memory_is_frozen_if_that_is_said_for_an_agent_or_none() {
    let plain = create(r#"{"image_path": "i"}"#).unwrap();
    assert!(!plain.freezes_memory && plain.agent.is_none());
    let frozen = create(r#"{"image_path": "i", "freeze_memory": true}"#).unwrap();
    assert!(frozen.freezes_memory && frozen.agent.is_none());
    let shared = create(r#"{"image_path": "i", "freeze_memory": true, "agent_path": "a"}"#).unwrap();
    assert_eq!((shared.freezes_memory, shared.agent), (true, Some("a".into())));
}

#[test]
fn what_is_missing_or_too_much_is_named() {
    for (json, refusal) in [
        (r#"{}"#, SnapshotError::Missing("snapshot_path")),
        (
            r#"{"mem_file_path": "m"}"#,
            SnapshotError::Missing("snapshot_path"),
        ),
        (
            r#"{"snapshot_path": "s"}"#,
            SnapshotError::Missing("mem_file_path"),
        ),
        (
            r#"{"image_path": "i", "snapshot_path": "s"}"#,
            SnapshotError::Exclusive("image_path", "snapshot_path"),
        ),
        (
            r#"{"snapshot_path": "s", "mem_file_path": "m", "guest_hook": {}}"#,
            SnapshotError::Needs("guest_hook", "image_path"),
        ),
        (
            r#"{"image_path": "i", "mem_file_path": "m"}"#,
            SnapshotError::Exclusive("image_path", "mem_file_path"),
        ),
        (
            r#"{"snapshot_path": "s", "mem_file_path": "s"}"#,
            SnapshotError::OneFile("s".into()),
        ),
        (
            r#"{"snapshot_path": "s", "mem_file_path": "m", "excluded_drives": ["a"]}"#,
            SnapshotError::Needs("excluded_drives", "image_path"),
        ),
        (
            r#"{"snapshot_path": "s", "mem_file_path": "m", "freeze_memory": true}"#,
            SnapshotError::Needs("freeze_memory", "image_path"),
        ),
        (
            r#"{"image_path": "i", "agent_path": "a"}"#,
            SnapshotError::Needs("agent_path", "freeze_memory"),
        ),
    ] {
        assert_eq!(create(json), Err(refusal), "{json}");
    }
    let backend = r#""mem_backend": {"backend_type": "File", "backend_path": "m"}"#;
    for (json, refusal) in [
        (r#"{}"#.to_owned(), SnapshotError::Missing("snapshot_path")),
        (r#"{"snapshot_path": "s"}"#.to_owned(), SnapshotError::NoMemory),
        (
            format!(r#"{{"snapshot_path": "s", "mem_file_path": "m", {backend}}}"#),
            SnapshotError::TwoMemories,
        ),
        (
            format!(r#"{{"image": "i", {backend}}}"#),
            SnapshotError::Exclusive("image", "mem_backend"),
        ),
        (
            r#"{"agent_path": "a"}"#.to_owned(),
            SnapshotError::Needs("agent_path", "image"),
        ),
        (
            r#"{"snapshot_path": "s", "mem_backend": {"backend_type": "Uffd", "backend_path": "u"}}"#
                .to_owned(),
            SnapshotError::Uffd,
        ),
        (
            r#"{"snapshot_path": "s", "mem_file_path": "m", "record": {"path": "r"}}"#.to_owned(),
            SnapshotError::Needs("record", "image"),
        ),
        (
            r#"{"image": "i", "vsock_override": {"uds_path": "u"}}"#.to_owned(),
            SnapshotError::Vsock,
        ),
        (
            r#"{"image": "i", "huge_pages": "2M"}"#.to_owned(),
            SnapshotError::HugePages(SnapshotHugePages::Hugetlbfs2M),
        ),
    ] {
        assert_eq!(load(&json), Err(refusal), "{json}");
    }
}

#[test]
fn an_image_of_another_host_needs_an_agent() {
    let url = "http://127.0.0.1:5000/web:latest";
    assert_eq!(
        load(&format!(r#"{{"image": "{url}"}}"#)),
        Err(SnapshotError::NoAgent(url.to_owned()))
    );
    let loaded = load(&format!(
        r#"{{"image": "{url}", "agent_path": "/run/agent.sock"}}"#
    ))
    .unwrap();
    let agent = Image::Agent {
        reference: url.to_owned(),
        socket: "/run/agent.sock".into(),
    };
    assert_eq!(loaded.from, LoadFrom::Image(agent));
    let local = load(r#"{"image": "/srv/image", "stall_after_ms": 1500}"#).unwrap();
    assert_eq!(local.from, LoadFrom::Image(Image::Directory("/srv/image".into())));
    assert_eq!(local.stall_after, Some(Duration::from_millis(1500)));
    assert_eq!(local.overlay_directory, None);
    let elsewhere = load(r#"{"image": "/srv/image", "overlay_directory": "/srv/overlays"}"#).unwrap();
    assert_eq!(elsewhere.overlay_directory, Some("/srv/overlays".into()));
    assert_eq!(elsewhere.record, None);
    let recorded =
        load(r#"{"image": "/srv/image", "record": {"path": "/srv/set", "duration_ms": 1500}}"#).unwrap();
    let record = Record {
        path: "/srv/set".into(),
        time: Some(Duration::from_millis(1500)),
    };
    assert_eq!(recorded.record, Some(record));
    let two_files = r#"{"snapshot_path": "s", "mem_file_path": "m", "overlay_directory": "/srv/overlays"}"#;
    assert_eq!(
        load(two_files),
        Err(SnapshotError::Needs("overlay_directory", "image"))
    );
}

#[test]
fn overrides_name_each_thing_once_and_by_a_possible_name() {
    let twice = r#"{"image": "i", "drive_overrides": [
        {"drive_id": "a", "path_on_host": "x"}, {"drive_id": "a", "path_on_host": "y"}]}"#;
    assert_eq!(
        load(twice),
        Err(SnapshotError::Twice {
            field: "drive_overrides",
            id: "a".parse().unwrap()
        })
    );
    let tap = r#"{"image": "i", "network_overrides": [{"iface_id": "eth0", "host_dev_name": "a/b"}]}"#;
    assert_eq!(load(tap), Err(SnapshotError::TapName("a/b".to_owned())));
    let id = r#"{"image": "i", "network_overrides": [{"iface_id": "", "host_dev_name": "tap0"}]}"#;
    assert!(matches!(
        load(id),
        Err(SnapshotError::Id {
            field: "network_overrides",
            ..
        })
    ));
    assert!(matches!(
        create(r#"{"image_path": "i", "excluded_drives": ["../a"]}"#),
        Err(SnapshotError::Id {
            field: "excluded_drives",
            ..
        })
    ));
}

#[test]
fn a_guest_is_asked_for_five_seconds_and_insisted_upon_unless_told_otherwise() {
    let hook = |json: &str| {
        let body = format!(r#"{{"image_path": "i", "guest_hook": {json}}}"#);
        create(&body).map(|create| create.guest_hook)
    };
    let of = |ms, otherwise| {
        let deadline = Duration::from_millis(ms);
        Ok(Some(GuestHook { deadline, otherwise }))
    };
    assert_eq!(hook("null"), Ok(None));
    assert_eq!(hook("{}"), of(5000, Otherwise::Fail));
    assert_eq!(
        hook(r#"{"deadline_ms": 600000, "otherwise": "proceed"}"#),
        of(600_000, Otherwise::Proceed)
    );
    assert!(!hook(r#"{"deadline_ms": 0}"#).unwrap().unwrap().asks());
    assert!(matches!(
        hook(r#"{"deadline_ms": 600001}"#),
        Err(SnapshotError::HookDeadline(_))
    ));
}
