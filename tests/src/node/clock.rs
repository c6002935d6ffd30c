//! Time-outs, stretched by one factor: an emulated node is ten times slower than a real one.

use std::time::Duration;

/// The factor from `BRIG_TIME_SCALE`; 1 when it is not set or not a positive number.
#[must_use]
pub fn scale() -> f64 {
    std::env::var("BRIG_TIME_SCALE")
        .ok()
        .and_then(|text| text.parse::<f64>().ok())
        .filter(|factor| factor.is_finite() && *factor > 0.0)
        .unwrap_or(1.0)
}

/// How long to wait here for what takes at most `seconds` on a real node.
#[must_use]
pub fn seconds(seconds: u32) -> Duration {
    Duration::from_secs_f64(f64::from(seconds) * scale())
}
