//! Figures and the report that they go into.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

/// Several measurements of one thing.
#[derive(Clone, Debug)]
pub(crate) struct Samples {
    unit: &'static str,
    values: Vec<f64>,
}

impl Samples {
    /// Values of `unit`.
    #[must_use]
    pub(crate) fn new(unit: &'static str, values: Vec<f64>) -> Self {
        Self { unit, values }
    }

    /// Times, in milliseconds.
    #[must_use]
    pub(crate) fn milliseconds(times: &[Duration]) -> Self {
        Self::new("ms", times.iter().map(|time| time.as_secs_f64() * 1e3).collect())
    }

    /// The value that a share of all does not exceed; the nearest that was measured.
    ///
    /// # Panics
    /// When nothing was measured.
    #[must_use]
    pub(crate) fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (share * (sorted.len() - 1) as f64).round() as usize;
        sorted[rank]
    }

    /// Without those that were measured first.
    #[must_use]
    pub(crate) fn after_first(&self, number: usize) -> Self {
        Self::new(self.unit, self.values.iter().skip(number).copied().collect())
    }

    fn to_json(&self) -> Value {
        json!({
            "median": rounded(self.quantile(0.5)),
            "min": rounded(self.quantile(0.0)),
            "max": rounded(self.quantile(1.0)),
            "unit": self.unit,
            "runs": self.values.len(),
        })
    }
}

/// To three places: more would be noise.
fn rounded(value: f64) -> Value {
    let value = (value * 1e3).round() / 1e3;
    if value.fract() == 0.0 && value.abs() < 1e15 {
        json!(value as i64)
    } else {
        json!(value)
    }
}

/// What was measured of one monitor, by name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Metrics {
    samples: BTreeMap<String, Samples>,
}

impl Metrics {
    /// Adds one, and prints it.
    pub(crate) fn add(&mut self, name: &str, samples: Samples) {
        let [median, min, max] = [0.5, 0.0, 1.0].map(|share| samples.quantile(share));
        let (unit, runs) = (samples.unit, samples.values.len());
        println!("  {name:<42} {median:>10.2} {unit:<8} ({min:.2} to {max:.2}, {runs} runs)");
        self.samples.insert(name.to_owned(), samples);
    }

    /// The median of one that was added.
    #[must_use]
    pub(crate) fn median(&self, name: &str) -> Option<f64> {
        Some(self.samples.get(name)?.quantile(0.5))
    }

    /// All of them.
    #[must_use]
    pub(crate) fn to_json(&self) -> Value {
        let all = self.samples.iter();
        Value::Object(
            all.map(|(name, samples)| (name.clone(), samples.to_json()))
                .collect(),
        )
    }
}
