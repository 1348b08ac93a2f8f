//! From logits to a token.
//!
//! The order is Hugging Face transformers': repetition penalty, temperature, top-k, top-p, min-p; then one draw. Draws come
//! from Philox with the seed as key and the token's number as counter, so a seed gives the same text on every machine whose
//! logits are the same.

use crate::backend::dropout::philox;
use crate::{Error, Result};

/// How the next token is chosen. The default is greedy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Keep the k likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Keep the likeliest tokens that together reach this probability; 1 for all.
    pub top_p: f64,
    /// Drop tokens under this share of the likeliest one's probability; 0 for none.
    pub min_p: f64,
    /// Logits of tokens that were seen are divided by this where positive, multiplied where negative (CTRL, Keskar et al.,
    /// 2019); 1 for no penalty.
    pub repetition_penalty: f64,
    /// Seeds the draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// Refuses values that have no meaning; one error lists all of them.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn check(&self) -> Result<()> {
        let Self { temperature, top_p, min_p, repetition_penalty, .. } = *self;
        let mut wrong = Vec::new();
        if !(temperature >= 0.0 && temperature.is_finite()) {
            wrong.push(format!("temperature is {temperature}; it must be 0 or more"));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            wrong.push(format!("top_p is {top_p}; it must be over 0 and at most 1"));
        }
        if !(0.0..=1.0).contains(&min_p) {
            wrong.push(format!("min_p is {min_p}; it must be in [0, 1]"));
        }
        if !(repetition_penalty > 0.0 && repetition_penalty.is_finite()) {
            wrong.push(format!("repetition_penalty is {repetition_penalty}; it must be over 0"));
        }
        if wrong.is_empty() { Ok(()) } else { Err(Error::setting("sampling", wrong.join("; "))) }
    }

    /// The `number`th token of a generation, from its logits `[V]` (changed in place) and the tokens seen so far.
    ///
    /// # Errors
    /// Logits of which none is finite.
    pub fn choose(&self, logits: &mut [f32], seen: &[u32], number: u64) -> Result<u32> {
        if self.repetition_penalty != 1.0 {
            penalise(logits, seen, self.repetition_penalty as f32);
        }
        let best = (0..logits.len()).filter(|&token| logits[token].is_finite()).max_by(|&a, &b| {
            // The first of equals, as an argmax gives it.
            logits[a].total_cmp(&logits[b]).then(b.cmp(&a))
        });
        let Some(best) = best else {
            return Err(Error::op("sampling", "no logit is finite; the weights or the adapter are broken"));
        };
        if self.temperature == 0.0 {
            return Ok(best as u32);
        }
        let kept = self.kept(logits, logits[best]);
        let words = philox([number as u32, (number >> 32) as u32, 1, 0], [self.seed as u32, (self.seed >> 32) as u32]);
        let fraction = (((words[0] as u64) << 32 | words[1] as u64) >> 11) as f64 / (1_u64 << 53) as f64;
        let mut left = fraction * kept.iter().map(|(_, weight)| weight).sum::<f64>();
        for &(token, weight) in &kept {
            left -= weight;
            if left < 0.0 {
                return Ok(token);
            }
        }
        Ok(kept.last().map_or(best as u32, |&(token, _)| token))
    }

    /// The tokens that may be drawn, the likeliest first, with weights relative to the likeliest.
    fn kept(&self, logits: &[f32], best: f32) -> Vec<(u32, f64)> {
        let weight = |logit: f32| ((logit - best) as f64 / self.temperature).exp();
        let mut kept: Vec<(u32, f64)> =
            logits.iter().enumerate().map(|(token, &logit)| (token as u32, weight(logit))).collect();
        // What is not finite was passed over for the best, and is here.
        kept.retain(|(_, weight)| *weight > 0.0 && weight.is_finite());
        kept.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if self.top_k > 0 {
            kept.truncate(self.top_k);
        }
        let wanted = self.top_p * kept.iter().map(|(_, weight)| weight).sum::<f64>();
        if self.top_p < 1.0 {
            let mut reached = 0.0;
            let count = kept.iter().take_while(|(_, weight)| {
                let before = reached;
                reached += weight;
                before < wanted
            });
            let count = count.count();
            kept.truncate(count);
        }
        kept.retain(|(_, weight)| *weight >= self.min_p);
        kept
    }
}

fn penalise(logits: &mut [f32], seen: &[u32], penalty: f32) {
    let mut seen: Vec<u32> = seen.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for token in seen {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, -1.0, 3.0];

    fn drawn(sampling: Sampling) -> [usize; 5] {
        let mut counts = [0; 5];
        for number in 0..20_000 {
            let mut logits = LOGITS;
            counts[sampling.choose(&mut logits, &[], number).unwrap() as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_the_likeliest() {
        assert_eq!(Sampling::default().choose(&mut LOGITS.clone(), &[], 0).unwrap(), 1);
        assert_eq!(Sampling::default().choose(&mut [f32::NAN, 1.0], &[], 0).unwrap(), 1);
        assert!(Sampling::default().choose(&mut [f32::NAN; 3], &[], 0).is_err());
        let hot = Sampling { temperature: 1.0, ..Sampling::default() };
        assert_eq!(hot.choose(&mut [f32::INFINITY, 1.0, f32::NAN, f32::NEG_INFINITY], &[], 0).unwrap(), 1);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let sampling = Sampling { temperature: 2.0, ..Sampling::default() };
        let weights: Vec<f64> = LOGITS.iter().map(|&logit| (logit as f64 / 2.0).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for (count, weight) in drawn(sampling).into_iter().zip(weights) {
            // Four standard deviations of a binomial.
            let p = weight / sum;
            let bound = 4.0 * (20_000.0 * p * (1.0 - p)).sqrt();
            assert!((count as f64 - 20_000.0 * p).abs() < bound, "{count} against {}", 20_000.0 * p);
        }
        assert_ne!(drawn(sampling), drawn(Sampling { seed: 1, ..sampling }));
        assert_eq!(drawn(sampling), drawn(sampling));
    }

    #[test]
    fn top_k_top_p_and_min_p_leave_tokens_out() {
        let base = Sampling { temperature: 1.0, ..Sampling::default() };
        let possible = |sampling| drawn(sampling).map(|count| count > 0);
        assert_eq!(possible(base), [true; 5]);
        assert_eq!(possible(Sampling { top_k: 3, ..base }), [false, true, true, false, true]);
        // The two likeliest hold 0.79 of the probability, with the third 0.94.
        assert_eq!(possible(Sampling { top_p: 0.75, ..base }), [false, true, false, false, true]);
        assert_eq!(possible(Sampling { top_p: 0.9, ..base }), [false, true, true, false, true]);
        assert_eq!(possible(Sampling { min_p: 0.3, ..base }), [false, true, true, false, true]);
    }

    #[test]
    fn a_penalty_turns_from_what_was_seen() {
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(sampling.choose(&mut LOGITS.clone(), &[1, 1], 0).unwrap(), 4);
        assert_eq!(sampling.choose(&mut [-1.0, -1.5], &[0, 9], 0).unwrap(), 1);
    }

    #[test]
    fn every_wrong_value_is_named() {
        let wrong =
            Sampling { temperature: f64::NAN, top_p: 0.0, min_p: 2.0, repetition_penalty: 0.0, ..Sampling::default() };
        let message = wrong.check().unwrap_err().to_string();
        for name in ["temperature", "top_p", "min_p", "repetition_penalty"] {
            assert!(message.contains(name), "{message}");
        }
    }
}
