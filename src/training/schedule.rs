//! Learning-rate schedules: constant, linear or cosine, after a linear warm-up.

use serde::{Deserialize, Serialize};

/// The shape of the schedule after the warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Stays at the full rate.
    Constant,
    /// Falls in a line to the last rate.
    Linear,
    /// Falls along half a cosine to the last rate.
    #[default]
    Cosine,
}

/// A learning-rate schedule over the steps of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// What follows the warm-up.
    pub kind: ScheduleKind,
    /// The full rate.
    pub rate: f64,
    /// Steps in which the rate climbs from `rate / warmup` to `rate`.
    pub warmup: usize,
    /// Steps of the whole run, warm-up included.
    pub total: usize,
    /// The last rate as a share of the full one; for `Constant` it has no meaning.
    pub min_ratio: f64,
}

impl Schedule {
    /// The rate of the `step`th step, from 1. Never zero before the end, so that the first step already learns.
    pub fn at(&self, step: usize) -> f64 {
        if step <= self.warmup {
            return self.rate * step as f64 / self.warmup as f64;
        }
        // The first step after the warm-up runs at the full rate, the last one at the last rate.
        let falling = self.total.saturating_sub(self.warmup + 1).max(1) as f64;
        let done = ((step - self.warmup - 1) as f64 / falling).min(1.0);
        let share = match self.kind {
            ScheduleKind::Constant => return self.rate,
            ScheduleKind::Linear => 1.0 - done,
            ScheduleKind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
        };
        self.rate * (self.min_ratio + (1.0 - self.min_ratio) * share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: ScheduleKind) -> Schedule {
        Schedule { kind, rate: 2.0, warmup: 4, total: 105, min_ratio: 0.1 }
    }

    #[test]
    fn warm_up_climbs_to_the_full_rate() {
        let rates: Vec<f64> = (1..=5).map(|step| schedule(ScheduleKind::Cosine).at(step)).collect();
        assert_eq!(rates, [0.5, 1.0, 1.5, 2.0, 2.0]);
    }

    #[test]
    fn falls_to_the_last_rate() {
        for (kind, middle) in [(ScheduleKind::Linear, 1.1), (ScheduleKind::Cosine, 1.1)] {
            assert!((schedule(kind).at(55) - middle).abs() < 1e-12, "{kind:?}");
            assert!((schedule(kind).at(105) - 0.2).abs() < 1e-12, "{kind:?}");
            assert!((schedule(kind).at(500) - 0.2).abs() < 1e-12, "{kind:?}");
        }
        assert!((schedule(ScheduleKind::Cosine).at(30) - (0.2 + 1.8 * 0.853_553_390_593)).abs() < 1e-9);
        assert_eq!(schedule(ScheduleKind::Constant).at(105), 2.0);
    }

    #[test]
    fn one_step_runs_at_the_full_rate() {
        let schedule = Schedule { kind: ScheduleKind::Cosine, rate: 1.0, warmup: 0, total: 1, min_ratio: 0.0 };
        assert_eq!(schedule.at(1), 1.0);
    }
}
