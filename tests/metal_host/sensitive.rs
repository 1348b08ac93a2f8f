//! The cases that find errors: few and small.

use candle_core::DType;
use metal_candle::backend::custom_ops::attention::Sequence;
use metal_candle::backend::custom_ops::swiglu::Activation;
use metal_candle::backend::metal::plan::Source;
use metal_candle::backend::quantized::Kind;

use crate::attention::{self, Heads};
use crate::decoder;
use crate::dequantize::dequantized;
use crate::harness::Host;
use crate::lora::{Case, Cases};
use crate::run::Run;

/// The kernels for f32 alone: a planted error in a template shows there too, and they compile in a fraction of the time.
fn f32_only(text: &str) -> String {
    let others = ["ADAPTER(f16, f32", "NORM(\"_f16_f16\"", "ATTENTION(\"_f16\"", "KINDS(\"_f16\""];
    let first = others.iter().filter_map(|other| text.find(other)).min().unwrap_or(text.len());
    // Of attention, the smallest size and the one that is summed in two parts.
    let kept =
        |line: &&str| !["64", "96", "128"].iter().any(|size| line.trim().starts_with(&format!("SIZES(\"{size}\"")));
    text[..first].lines().filter(kept).map(|line| format!("{line}\n")).collect()
}

/// Cases in which every loop of every kernel runs more than once, in few steps.
pub enum Sensitive {
    Lora(Cases),
    Runs(Vec<Run>),
}

impl Sensitive {
    pub fn of(source: Source) -> Self {
        match source {
            Source::Lora => {
                // k and n beyond what the simdgroups of a threadgroup cover at once, ranks of more than one block, several
                // tiles and chunks of rows.
                let f32s =
                    |m, size| (format!("m {m}, {size:?}"), Case::new(m, size, DType::F32, DType::F32).with_dropout());
                Self::Lora(vec![f32s(2, [70, 9, 150]), f32s(130, [100, 35, 110]), f32s(2049, [75, 6, 70])])
            }
            Source::Decoder => {
                let mut runs = decoder::rms_norm(70, 300, DType::F32, DType::F32);
                runs.extend(decoder::swiglu(1500, DType::F32, Activation::Silu));
                runs.extend(decoder::rope(33, 3, 34, DType::F32));
                runs.extend(decoder::embedding(9, 300, DType::F32));
                Self::Runs(runs)
            }
            Source::Training => {
                let mut runs = decoder::adamw(70_000);
                runs.extend(decoder::cross_entropy(3, 700));
                Self::Runs(runs)
            }
            Source::Attention => {
                let heads = Heads { query: 4, key: 2, size: 30 };
                let mut runs = attention::attention(&attention::mixed(), heads, Some(19), DType::F32);
                let one = [Sequence { q_start: 0, q_len: 20, k_start: 0, k_len: 20 }];
                runs.extend(attention::attention(&one, Heads { query: 1, key: 1, size: 250 }, None, DType::F32));
                runs.push(attention::large_scores());
                Self::Runs(runs)
            }
            // More elements than two threadgroups make.
            Source::Dequantize => {
                let of = |kind: Kind| dequantized(kind, 17, 256 / kind.block_len(), DType::F32);
                Self::Runs(Kind::ALL.map(of).into())
            }
        }
    }

    /// Why `text` is not right; `None` if nothing was seen.
    pub fn seen(&self, text: &str) -> Option<String> {
        let host = Host::compile(&f32_only(text)).unwrap();
        match self {
            Self::Lora(cases) => cases.iter().find_map(|(what, case)| case.check(&host, what).err()),
            Self::Runs(runs) => runs.iter().find_map(|run| run.check(&host).err()),
        }
    }
}
