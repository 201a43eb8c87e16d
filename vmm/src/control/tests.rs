//! The rules of order, held against a machine that needs no KVM.

use super::fake::{FakeEngine, Log};
use super::*;
use crate::config::{BootSourceBody, CreateSnapshotBody, LoadSnapshotBody, MachineUpdate};
use crate::exit::ExitCode;

struct Bench {
    control: Control<FakeEngine>,
    inbox: Arc<Inbox>,
    log: Log,
}

fn bench(fails: Option<&'static str>) -> Bench {
    bench_of(FakeEngine {
        fails,
        ..FakeEngine::default()
    })
}

fn bench_of(engine: FakeEngine) -> Bench {
    let log = Arc::clone(&engine.log);
    let status = Status::new("test".parse().unwrap());
    let inbox = Inbox::new().unwrap();
    let (config, set_logger) = (MicrovmConfig::default(), Box::new(|_| Ok(())));
    Bench {
        control: Control::new(engine, Arc::clone(&inbox), status, config, set_logger),
        inbox,
        log,
    }
}

impl Bench {
    fn ask(&mut self, request: Request) -> Result<Reply, String> {
        self.control.handle(request).map_err(|fault| fault.to_string())
    }

    fn started(mut self) -> Self {
        assert_eq!(self.ask(boot_source()), Ok(Reply::Empty));
        assert_eq!(self.ask(Request::InstanceStart), Ok(Reply::Empty));
        self
    }

    fn state(&self) -> VmState {
        self.control.status().state()
    }

    fn log(&self) -> Vec<&'static str> {
        self.log.lock().unwrap().clone()
    }
}

fn boot_source() -> Request {
    Request::PutBootSource(BootSourceBody {
        kernel_image_path: "/proc/self/exe".into(),
        ..BootSourceBody::default()
    })
}

fn load(json: &str) -> Request {
    Request::LoadSnapshot(
        serde_json::from_str::<LoadSnapshotBody>(json)
            .unwrap()
            .try_into()
            .unwrap(),
    )
}

fn create(json: &str) -> Request {
    Request::CreateSnapshot(
        serde_json::from_str::<CreateSnapshotBody>(json)
            .unwrap()
            .try_into()
            .unwrap(),
    )
}

const TWO_FILES: &str = r#"{"snapshot_path": "s", "mem_file_path": "m"}"#;
const IMAGE: &str = r#"{"image_path": "i"}"#;
const TOO_EARLY: &str = "The requested operation is not supported before starting the microVM.";
const TOO_LATE: &str = "The requested operation is not supported after starting the microVM.";

#[test]
fn a_machine_boots_pauses_and_runs_on() {
    let mut bench = bench(None);
    assert_eq!(bench.state(), VmState::NotStarted);
    bench = bench.started();
    assert_eq!(bench.state(), VmState::Running);
    bench.ask(Request::Pause).unwrap();
    assert_eq!(bench.state(), VmState::Paused);
    bench.ask(Request::Pause).unwrap();
    bench.ask(Request::Resume).unwrap();
    bench.ask(Request::Resume).unwrap();
    assert_eq!(bench.state(), VmState::Running);
    assert_eq!(bench.log(), ["boot", "resume", "pause", "resume"]);
}

#[test]
fn what_needs_a_machine_is_refused_before_there_is_one() {
    let mut bench = bench(None);
    for request in [
        Request::Pause,
        Request::Resume,
        Request::SendCtrlAltDel,
        Request::FlushMetrics,
        create(TWO_FILES),
    ] {
        assert_eq!(bench.ask(request).unwrap_err(), TOO_EARLY);
    }
    assert!(bench.log().is_empty());
}

#[test]
fn what_makes_a_machine_is_refused_once_there_is_one() {
    let mut bench = bench(None).started();
    let two_gib = MachineUpdate {
        mem_size_mib: Some(2048),
        ..MachineUpdate::default()
    };
    for request in [
        boot_source(),
        Request::PatchMachineConfig(two_gib),
        Request::PutSerial(Default::default()),
        Request::PutEntropy(Default::default()),
        Request::PutLogger(Default::default()),
        Request::InstanceStart,
        load(TWO_FILES),
    ] {
        assert_eq!(bench.ask(request).unwrap_err(), TOO_LATE);
    }
    let Reply::Machine(machine) = bench.ask(Request::GetMachineConfig).unwrap() else {
        panic!("no machine")
    };
    assert_eq!(machine.mem_size_mib, 128);
}

#[test]
fn a_start_without_a_kernel_or_one_that_fails_leaves_everything_as_it_was() {
    let mut bench = bench(Some("boot"));
    assert!(
        bench
            .ask(Request::InstanceStart)
            .unwrap_err()
            .contains("without kernel configuration")
    );
    bench.ask(boot_source()).unwrap();
    assert_eq!(
        bench.ask(Request::InstanceStart).unwrap_err(),
        "Start microvm error: boot failed"
    );
    assert_eq!(bench.state(), VmState::NotStarted);
    bench.control.engine.fails = None;
    bench.ask(Request::InstanceStart).unwrap();
    assert_eq!(bench.state(), VmState::Running);
}

#[test]
fn a_snapshot_is_loaded_into_a_fresh_monitor_alone() {
    let mut configured = bench(None);
    configured.ask(Request::PutEntropy(Default::default())).unwrap();
    assert!(
        configured
            .ask(load(TWO_FILES))
            .unwrap_err()
            .contains("not allowed after configuring")
    );

    let mut fresh = bench(None);
    fresh.ask(Request::PutSerial(Default::default())).unwrap();
    fresh.ask(load(TWO_FILES)).unwrap();
    assert_eq!(fresh.state(), VmState::Paused);
    assert_eq!(fresh.log(), ["load"]);

    let mut resumed = bench(None);
    resumed.ask(load(r#"{"image": "i", "resume_vm": true}"#)).unwrap();
    assert_eq!(resumed.state(), VmState::Running);
    assert_eq!(resumed.log(), ["load", "resume"]);
}

#[test]
fn a_load_that_fails_leaves_the_monitor_fresh() {
    let mut bench = bench(Some("load"));
    assert_eq!(
        bench.ask(load(TWO_FILES)).unwrap_err(),
        "Load snapshot error: load failed"
    );
    assert_eq!(bench.state(), VmState::NotStarted);
    let progress = bench.control.status().progress().unwrap();
    assert_eq!(
        (progress.kind, progress.state),
        (OperationKind::Load, OperationState::Failed)
    );
    bench.control.engine.fails = None;
    bench.ask(load(TWO_FILES)).unwrap();
    assert_eq!(bench.state(), VmState::Paused);
}

#[test]
fn two_files_are_saved_of_a_paused_machine_and_an_image_of_a_running_one_too() {
    let mut bench = bench(None).started();
    assert!(bench.ask(create(TWO_FILES)).unwrap_err().contains("is running"));
    bench.ask(create(IMAGE)).unwrap();
    assert_eq!(bench.state(), VmState::Running);
    bench.ask(Request::Pause).unwrap();
    bench.ask(create(TWO_FILES)).unwrap();
    assert_eq!(bench.state(), VmState::Paused);
    let progress = bench.control.status().progress().unwrap();
    assert_eq!(
        (progress.state, progress.phase),
        (OperationState::Done, "copying")
    );
}

#[test]
fn a_pause_that_fails_leaves_the_machine_running() {
    let mut bench = bench(Some("pause")).started();
    assert_eq!(
        bench.ask(Request::Pause).unwrap_err(),
        "Internal VMM error: pause failed"
    );
    assert_eq!(bench.state(), VmState::Running);
}

#[test]
fn a_stalled_machine_says_so_in_its_instance_info() {
    let bench = bench(None).started();
    let info = serde_json::to_value(bench.control.status().instance_info()).unwrap();
    assert_eq!(info["stalled"]["volume"], "memory");
    assert_eq!(info["stalled"]["chunk"], 7);
    assert_eq!(info["state"], "Running");
    assert_eq!(info["app_name"], "Firecracker");
}

#[test]
fn only_the_operation_that_is_under_way_can_be_cancelled() {
    let bench = bench(None);
    let status = Arc::clone(bench.control.status());
    assert!(!status.cancel(OperationKind::Create));
    let operation = status.begin(OperationKind::Create);
    assert!(!status.cancel(OperationKind::Load));
    assert!(status.cancel(OperationKind::Create));
    assert!(operation.is_cancelled());
}

#[test]
fn the_loop_answers_in_order_and_ends_with_the_machine() {
    let mut bench = bench(None);
    let (answers, received) = std::sync::mpsc::channel();
    for request in [
        boot_source(),
        Request::InstanceStart,
        Request::Pause,
        Request::SendCtrlAltDel,
    ] {
        let answers = answers.clone();
        bench
            .inbox
            .post(request, move |outcome| answers.send(outcome.is_ok()).unwrap());
    }
    assert_eq!(run(&mut bench.control).unwrap(), ExitCode::Ok);
    drop(answers);
    assert_eq!(received.iter().collect::<Vec<_>>(), [true; 4]);
}

#[test]
fn beside_a_snapshot_all_but_another_one_is_answered() {
    let mut bench = bench(None).started();
    let (answers, received) = std::sync::mpsc::channel();
    for (name, request) in [
        ("snapshot", create(IMAGE)),
        ("second snapshot", create(IMAGE)),
        ("pause", Request::Pause),
        ("config", Request::GetMachineConfig),
        ("boot source", boot_source()),
        ("resume", Request::Resume),
    ] {
        let (answers, inbox) = (answers.clone(), Arc::clone(&bench.inbox));
        bench.inbox.post(request, move |outcome| {
            answers.send((name, outcome.is_ok())).unwrap();
            if name == "second snapshot" {
                inbox.end();
            }
        });
    }
    assert_eq!(run(&mut bench.control).unwrap(), ExitCode::Ok);
    drop(answers);
    assert_eq!(
        received.iter().collect::<Vec<_>>(),
        [
            ("config", true),
            ("boot source", false),
            ("pause", true),
            ("resume", true),
            ("snapshot", true),
            ("second snapshot", true),
        ]
    );
    assert_eq!(
        bench.log()[2..],
        [
            "save",
            "memory is read",
            "pause",
            "resume",
            "save",
            "memory is read"
        ]
    );
}

#[test]
fn the_loop_looks_after_a_machine_without_being_asked() {
    let mut bench = bench_of(FakeEngine {
        look_again: Some(std::time::Duration::from_micros(1)),
        ..FakeEngine::default()
    })
    .started();
    assert_eq!(run(&mut bench.control).unwrap(), ExitCode::Ok);
    assert_eq!(
        bench.log(),
        ["boot", "resume", "look after", "look after", "look after"]
    );
}

#[test]
fn the_loop_ends_when_asked_to_and_drops_what_it_did_not_answer() {
    let mut bench = bench(None);
    let (answers, received) = std::sync::mpsc::channel::<()>();
    bench.inbox.end();
    bench
        .inbox
        .post(Request::InstanceStart, move |_| answers.send(()).unwrap());
    assert_eq!(run(&mut bench.control).unwrap(), ExitCode::Ok);
    drop(bench);
    assert!(received.recv().is_err());
}
