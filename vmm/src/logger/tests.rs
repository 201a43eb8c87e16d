use std::io::Read;

use super::*;

/// Runs `body` with a log of its own that goes to a file, and hands back what was written.
fn logged(update: &LoggerBody, body: impl FnOnce(&Logger)) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let logger = Logger::new("test".parse().unwrap());
    logger
        .update(&LoggerBody {
            log_path: Some(path.clone()),
            ..update.clone()
        })
        .unwrap();
    let subscriber = tracing_subscriber::registry().with(logger.clone());
    tracing::subscriber::with_default(subscriber, || body(&logger));
    std::fs::read_to_string(path).unwrap()
}

#[test]
fn a_line_has_time_instance_thread_and_message() {
    let log = logged(&LoggerBody::default(), |_| tracing::info!(answer = 42, "hello"));
    let (time, rest) = log.split_once(' ').unwrap();
    assert_eq!(time.len(), "2026-11-23T04:11:37.123456789".len());
    assert!(
        rest.starts_with("[test:") && rest.ends_with("] hello answer=42\n"),
        "{log}"
    );
    assert!(!rest.contains("INFO"));
}

#[test]
fn level_and_origin_are_shown_if_wanted() {
    let wanted = LoggerBody {
        show_level: Some(true),
        show_log_origin: Some(true),
        ..LoggerBody::default()
    };
    let log = logged(&wanted, |_| tracing::warn!("careful"));
    assert!(
        log.contains(":WARN:") && log.contains("logger/tests.rs:"),
        "{log}"
    );
}

#[test]
fn lines_below_the_level_or_of_other_modules_are_left_out() {
    let quiet = LoggerBody {
        level: Some("WARNING".into()),
        ..LoggerBody::default()
    };
    let log = logged(&quiet, |logger| {
        tracing::info!("one");
        tracing::warn!("two");
        // Info again, as with Firecracker: the level was left out.
        logger.update(&LoggerBody::default()).unwrap();
        tracing::info!("three");
        tracing::debug!("four");
    });
    assert!(
        !log.contains("one") && log.contains("two") && log.contains("three") && !log.contains("four"),
        "{log}"
    );

    let other = LoggerBody {
        module: Some("elsewhere".into()),
        ..LoggerBody::default()
    };
    assert_eq!(logged(&other, |_| tracing::error!("five")), "");
    let mine = LoggerBody {
        module: Some("runnel_vmm::logger".into()),
        ..LoggerBody::default()
    };
    assert!(logged(&mine, |_| tracing::error!("six")).contains("six"));
}

#[test]
fn a_message_stays_on_its_line_and_within_its_bounds() {
    let log = logged(&LoggerBody::default(), |_| {
        tracing::info!("a\nb\u{1b}[31m");
        tracing::info!("{}", "ä".repeat(10_000));
    });
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines.len(), 2);
    assert!(lines[0].ends_with(r"a\nb\u{1b}[31m"), "{}", lines[0]);
    assert!(lines[1].len() < 9000 && lines[1].ends_with("ä…"));
}

#[test]
fn a_named_pipe_that_nobody_reads_costs_lines_and_not_the_machine() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .unwrap();
    let logger = Logger::new("test".parse().unwrap());
    logger
        .update(&LoggerBody {
            log_path: Some(path.clone()),
            ..LoggerBody::default()
        })
        .unwrap();
    let subscriber = tracing_subscriber::registry().with(logger.clone());
    tracing::subscriber::with_default(subscriber, || {
        tracing::info!("first");
        let mut reader = File::open(&path).unwrap();
        let mut first = [0; 200];
        let length = reader.read(&mut first).unwrap();
        assert!(
            std::str::from_utf8(&first[..length])
                .unwrap()
                .ends_with("first\n")
        );
        drop(reader);
        // Far more than a pipe holds.
        for _ in 0..40 {
            tracing::info!("{}", "x".repeat(8000));
        }
    });
    assert!(logger.missed_lines() > 0);
}

#[test]
fn a_level_or_file_that_makes_no_sense_is_refused_and_changes_nothing() {
    let log = logged(&LoggerBody::default(), |logger| {
        let level = LoggerBody {
            level: Some("Loud".into()),
            ..LoggerBody::default()
        };
        assert!(matches!(logger.update(&level), Err(LoggerError::Level(_))));
        let file = LoggerBody {
            log_path: Some("/nonexistent/log".into()),
            level: Some("Off".into()),
            ..LoggerBody::default()
        };
        assert!(matches!(logger.update(&file), Err(LoggerError::Open { .. })));
        tracing::info!("still there");
    });
    assert!(log.contains("still there"));
}
