//! What is aimed at, and whether it was reached: with what was measured of which a figure is made, a miss is either the
//! network's, or this host's, or a round trip too many.

use serde_json::{Value, json};

use super::metrics::Metrics;

/// How far a median may be.
#[derive(Clone, Copy, Debug)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

struct Aim {
    name: String,
    bound: Bound,
    parts: Value,
}

impl Aim {
    fn at_most(name: &str, bound: f64, parts: Value) -> Self {
        Self {
            name: name.to_owned(),
            bound: Bound::AtMost(bound),
            parts,
        }
    }

    fn verdict(self, median: f64) -> (String, Value) {
        let (kind, bound, met) = match self.bound {
            Bound::AtMost(bound) => ("at_most", bound, median <= bound),
            Bound::AtLeast(bound) => ("at_least", bound, median >= bound),
        };
        let verdict = json!({kind: bound, "median": median, "met": met, "parts": self.parts});
        (self.name, verdict)
    }
}

/// All aims, by name; `first_bytes` is what the bytes before the first instruction are made of.
pub(crate) fn reached(metrics: &Metrics, peers: &Value, first_bytes: &Value, round_trip_ms: f64) -> Value {
    let mut aims = of_resumes(metrics, peers, first_bytes, round_trip_ms);
    aims.extend(of_faults(metrics, round_trip_ms));
    aims.extend(of_snapshots(metrics));
    let verdicts = aims.into_iter().map(|aim| {
        let found = median(metrics, &aim.name);
        aim.verdict(found)
    });
    Value::Object(verdicts.collect())
}

fn median(metrics: &Metrics, name: &str) -> f64 {
    metrics.median(name).unwrap_or(f64::NAN)
}

fn of_resumes(metrics: &Metrics, peers: &Value, first_bytes: &Value, round_trip_ms: f64) -> Vec<Aim> {
    let median = |name: &str| median(metrics, name);
    let local = median("resume_local_ms");
    let resume = |name: &str, round_trips: f64| {
        let parts = json!({
            "resume_local_ms": local,
            "round_trip_ms": round_trip_ms,
            "round_trips_beyond_local": (median(name) - local) / round_trip_ms,
            "resume_remote_0ms_ms": median("resume_remote_0ms_ms"),
        });
        Aim::at_most(name, local + round_trips * round_trip_ms, parts)
    };
    let of_memory = json!({
        "anonymous_kib": median("vmm_rss_anonymous_kib"),
        "code_and_files_kib": median("vmm_rss_kib") - median("vmm_rss_anonymous_kib"),
    });
    let mut aims = vec![
        resume("resume_remote_20ms_ms", 3.0),
        resume("resume_remote_20ms_cold_ms", 6.0),
        Aim::at_most(
            "bytes_before_first_instruction",
            256.0 * 1024.0,
            first_bytes.clone(),
        ),
        Aim::at_most("vmm_rss_kib", 6.0 * 1024.0, of_memory),
    ];
    let without_trace = median("resume_20ms_without_trace_ms");
    let of_trace = json!({
        "resume_20ms_without_trace_ms": without_trace,
        "times_sooner": without_trace / median("resume_20ms_with_trace_ms"),
        "mib": median("resume_20ms_with_trace_mib"),
        "mib_without": median("resume_20ms_without_trace_mib"),
    });
    aims.push(Aim::at_most(
        "resume_20ms_with_trace_ms",
        without_trace / 5.0,
        of_trace,
    ));
    if let Some(peer) = peers["firecracker"]["resume_local_ms"]["median"].as_f64() {
        let answer = peers["firecracker"]["resume_local_answer_ms"]["median"].as_f64();
        let parts = json!({
            "answer_ms": median("resume_local_answer_ms"),
            "guest_and_first_faults_ms": local - median("resume_local_answer_ms"),
            "firecracker_answer_ms": answer,
            "firecracker_guest_and_first_faults_ms": answer.map(|answer| peer - answer),
        });
        aims.push(Aim::at_most("resume_local_ms", peer, parts));
    }
    aims
}

fn of_faults(metrics: &Metrics, round_trip_ms: f64) -> Vec<Aim> {
    let round_trips = |name: &str| median(metrics, name) / round_trip_ms;
    let names = [
        "fault_remote_20ms_p50_ms",
        "fault_remote_20ms_p99_ms",
        "fault_remote_20ms_without_fill_p50_ms",
        "fault_remote_20ms_without_fill_p99_ms",
    ];
    let aim = |name: &str| {
        let parts = json!({
            "round_trip_ms": round_trip_ms,
            "round_trips": round_trips(name),
            "round_trips_p50_without_fill": round_trips("fault_remote_20ms_without_fill_p50_ms"),
            "round_trips_indexed_p99": round_trips("fault_remote_20ms_indexed_p99_ms"),
            "round_trips_indexed_p99_without_fill":
                round_trips("fault_remote_20ms_without_fill_indexed_p99_ms"),
        });
        Aim::at_most(name, 1.3 * round_trip_ms, parts)
    };
    names.map(aim).into()
}

fn of_snapshots(metrics: &Metrics) -> Vec<Aim> {
    let median = |name: &str| median(metrics, name);
    let mut aims = vec![
        Aim {
            name: "create_vs_zstd_ratio".to_owned(),
            bound: Bound::AtLeast(0.9),
            parts: json!({
                "snapshot_mib_per_s": median("snapshot_mib_per_s"),
                "zstd_mib_per_s": median("zstd_mib_per_s"),
            }),
        },
        Aim::at_most(
            "size_vs_zstd_frames_ratio",
            1.05,
            json!({"size_vs_zstd_whole_ratio": median("size_vs_zstd_whole_ratio")}),
        ),
    ];
    for fork in ["fork", "fork_machine"] {
        let [pss, kvm] = ["pss", "kvm"].map(|part| format!("{fork}_{part}_kib_per_clone"));
        aims.push(Aim::at_most(
            &format!("{fork}_host_kib_per_clone"),
            2048.0,
            json!({&pss: median(&pss), &kvm: median(&kvm)}),
        ));
    }
    for gib in [1, 4] {
        for (kind, more_ms) in [("idle", 0.0), ("writing", 30.0)] {
            let case = format!("{gib}gib_{kind}");
            let dirtied = metrics.median(&format!("dirtied_{case}_gib"));
            let parts = json!({
                "gap_without_snapshot_ms": median(&format!("gap_without_snapshot_{case}_ms")),
                "dirtied_gib": dirtied,
            });
            let bound = 10.0 + more_ms * dirtied.unwrap_or(0.0);
            aims.push(Aim::at_most(&format!("pause_{case}_ms"), bound, parts));
        }
    }
    aims
}
