//! The GGUF container, versions 2 and 3, little-endian: key-value pairs and a table of tensors, read in place.
//!
//! Layout: github.com/ggml-org/ggml, docs/gguf.md. A count in the file is believed only as far as bytes for it are there:
//! what is allocated stays in proportion to the file.

use std::collections::HashSet;

use candle_core::quantized::GgmlDType;

/// What went wrong, without the file's name.
pub type Result<T> = std::result::Result<T, String>;

/// A file's header, with views of its tensors' data.
#[derive(Debug)]
pub struct Container<'a> {
    pairs: Vec<(&'a str, Value<'a>)>,
    /// Each pair's value with its kind before it, as it stands in the file.
    raw: Vec<&'a [u8]>,
    /// In the file's order.
    pub tensors: Vec<TensorView<'a>>,
}

/// A tensor's description and bytes.
#[derive(Debug)]
pub struct TensorView<'a> {
    /// llama.cpp's name.
    pub name: &'a str,
    /// Slowest dimension first, as in the rest of this crate; the file has it the other way round.
    pub shape: Vec<usize>,
    /// How the values are stored.
    pub dtype: GgmlDType,
    /// As many bytes as the shape needs, aligned to 8.
    pub data: &'a [u8],
}

/// The value of a key.
#[derive(Debug, Clone, PartialEq)]
pub enum Value<'a> {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(&'a str),
    Texts(Vec<&'a str>),
    Numbers(Numbers<'a>),
}

/// An array of numbers or booleans, still as bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Numbers<'a> {
    kind: u32,
    bytes: &'a [u8],
}

/// The bytes of a value's kind; strings and arrays have no fixed size.
const SCALAR_SIZES: [usize; 13] = [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8];

/// The numbers of kinds of values.
pub mod kind {
    pub const U32: u32 = 4;
    pub const I32: u32 = 5;
    pub const F32: u32 = 6;
    pub const BOOL: u32 = 7;
    pub const STRING: u32 = 8;
    pub const ARRAY: u32 = 9;
}
use kind::{ARRAY, STRING};

/// Where `general.alignment` does not say otherwise.
pub const DEFAULT_ALIGNMENT: u64 = 32;

impl<'a> Value<'a> {
    /// A whole number of either sign's kind, if it is not negative.
    pub fn unsigned(&self) -> Option<u64> {
        match *self {
            Self::Unsigned(value) => Some(value),
            Self::Signed(value) => u64::try_from(value).ok(),
            _ => None,
        }
    }

    /// Any number.
    pub fn float(&self) -> Option<f64> {
        match *self {
            Self::Unsigned(value) => Some(value as f64),
            Self::Signed(value) => Some(value as f64),
            Self::Float(value) => Some(value),
            _ => None,
        }
    }

    /// Zero, false, empty: as if the key were not there.
    pub fn is_idle(&self) -> bool {
        match self {
            Self::Unsigned(value) => *value == 0,
            Self::Signed(value) => *value == 0,
            Self::Float(value) => *value == 0.0,
            Self::Bool(value) => !value,
            Self::Text(value) => value.is_empty(),
            Self::Texts(values) => values.is_empty(),
            Self::Numbers(values) => values.bytes.is_empty(),
        }
    }
}

/// As it would stand in JSON, arrays only by their size.
impl std::fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Unsigned(value) => write!(f, "{value}"),
            Self::Signed(value) => write!(f, "{value}"),
            Self::Float(value) => write!(f, "{value}"),
            Self::Bool(value) => write!(f, "{value}"),
            Self::Text(value) => write!(f, "'{value}'"),
            Self::Texts(values) => write!(f, "an array of {} strings", values.len()),
            Self::Numbers(values) => write!(f, "an array of {} numbers", values.len()),
        }
    }
}

impl<'a> Numbers<'a> {
    /// How many.
    pub fn len(&self) -> usize {
        self.bytes.len() / SCALAR_SIZES[self.kind as usize]
    }

    /// Each in turn.
    pub fn iter(self) -> impl Iterator<Item = Value<'a>> {
        self.bytes.chunks_exact(SCALAR_SIZES[self.kind as usize]).map(move |bytes| scalar(self.kind, bytes))
    }
}

/// `bytes` are as many as `kind` has.
fn scalar<'a>(kind: u32, bytes: &[u8]) -> Value<'a> {
    let mut wide = [0; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    let bits = u64::from_le_bytes(wide);
    match kind {
        1 => Value::Signed(i64::from(bits as u8 as i8)),
        3 => Value::Signed(i64::from(bits as u16 as i16)),
        5 => Value::Signed(i64::from(bits as u32 as i32)),
        11 => Value::Signed(bits as i64),
        6 => Value::Float(f64::from(f32::from_bits(bits as u32))),
        12 => Value::Float(f64::from_bits(bits)),
        7 => Value::Bool(bits != 0),
        _ => Value::Unsigned(bits),
    }
}

impl<'a> Container<'a> {
    /// Reads a whole file's bytes, which must be aligned to 8 (a mapped file is).
    pub fn parse(file: &'a [u8]) -> Result<Self> {
        let mut cursor = Cursor { file, at: 0 };
        if cursor.take(4)? != b"GGUF" {
            return Err("is not a GGUF file".to_string());
        }
        match cursor.u32()? {
            2 | 3 => {}
            version if (2..=3).contains(&version.swap_bytes()) => return Err("is a big-endian GGUF file".to_string()),
            version => return Err(format!("is of GGUF version {version}; 2 and 3 are read")),
        }
        let (tensor_count, pair_count) = (cursor.u64()?, cursor.u64()?);
        let (mut pairs, mut raw) = (Vec::new(), Vec::new());
        let mut seen = HashSet::new();
        for _ in 0..pair_count {
            let key = cursor.text()?;
            if !seen.insert(key) {
                return Err(format!("has the key {key} twice"));
            }
            let start = cursor.at;
            let kind = cursor.u32()?;
            pairs.push((key, cursor.value(kind).map_err(|problem| format!("{problem} (in {key})"))?));
            raw.push(&file[start..cursor.at]);
        }
        let mut container = Self { pairs, raw, tensors: Vec::new() };
        container.read_tensors(cursor, tensor_count)?;
        Ok(container)
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value<'a>> {
        self.pairs.iter().find(|(name, _)| *name == key).map(|(_, value)| value)
    }

    /// All keys with their values.
    pub fn pairs(&self) -> impl Iterator<Item = (&'a str, &Value<'a>)> {
        self.pairs.iter().map(|(name, value)| (*name, value))
    }

    /// All keys with their values as bytes, each with its kind before it.
    pub fn raw_pairs(&self) -> impl Iterator<Item = (&'a str, &'a [u8])> {
        self.pairs.iter().zip(&self.raw).map(|((name, _), bytes)| (*name, *bytes))
    }

    /// The tensor of a name.
    pub fn tensor(&self, name: &str) -> Option<&TensorView<'a>> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    fn read_tensors(&mut self, mut cursor: Cursor<'a>, count: u64) -> Result<()> {
        let alignment = self.get("general.alignment").map_or(Some(DEFAULT_ALIGNMENT), Value::unsigned);
        let Some(alignment) = alignment.filter(|value| value.is_power_of_two() && (8..=1 << 16).contains(value)) else {
            return Err("general.alignment is not a power of two from 8 to 65536".to_string());
        };
        let mut infos = Vec::new();
        let mut seen = HashSet::new();
        let mut unread = Vec::new();
        for _ in 0..count {
            let name = cursor.text()?;
            if !seen.insert(name) {
                return Err(format!("has the tensor {name} twice"));
            }
            let dimensions = cursor.u32()?;
            if !(1..=4).contains(&dimensions) {
                return Err(format!("the tensor {name} has {dimensions} dimensions"));
            }
            let mut shape = Vec::new();
            for _ in 0..dimensions {
                shape.push(usize::try_from(cursor.u64()?).map_err(|_| format!("the tensor {name} is too large"))?);
            }
            shape.reverse();
            let (kind, offset) = (cursor.u32()?, cursor.u64()?);
            match dtype(kind) {
                Ok(dtype) => infos.push((name, shape, dtype, offset)),
                Err(kind) => unread.push(format!("{name} ({kind})")),
            }
        }
        if !unread.is_empty() {
            let known = "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 and Q2_K to Q6_K are read";
            return Err(format!("stores tensors in ways that are not known: {}; {known}", list(&unread)));
        }

        let start = (cursor.at as u64).next_multiple_of(alignment);
        let data = usize::try_from(start).ok().and_then(|start| cursor.file.get(start..)).unwrap_or_default();
        let (mut problems, mut total) = (Vec::new(), 0usize);
        for (name, shape, dtype, offset) in infos {
            let row = shape.last().copied().unwrap_or(1);
            let elements = shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
            let whole = row.is_multiple_of(dtype.block_size());
            let size = elements.filter(|_| whole).and_then(|n| (n / dtype.block_size()).checked_mul(dtype.type_size()));
            let range = size.and_then(|size| {
                let offset = usize::try_from(offset).ok()?;
                Some(offset..offset.checked_add(size)?)
            });
            match range.and_then(|range| data.get(range)) {
                Some(bytes) if offset.is_multiple_of(alignment) => {
                    total = total.saturating_add(bytes.len());
                    self.tensors.push(TensorView { name, shape, dtype, data: bytes });
                }
                _ => problems.push(format!("{name} {shape:?} {dtype:?} at {offset}")),
            }
        }
        if !problems.is_empty() {
            let bytes = data.len();
            return Err(format!("is cut short or broken: its {bytes} bytes of data do not hold {}", list(&problems)));
        }
        if total > data.len() {
            return Err("is broken: its tensors overlap".to_string());
        }
        Ok(())
    }
}

/// The first of many, and how many more there are.
pub fn list(items: &[String]) -> String {
    const SHOWN: usize = 20;
    let shown = items[..items.len().min(SHOWN)].join("; ");
    if items.len() > SHOWN { format!("{shown}; and {} more", items.len() - SHOWN) } else { shown }
}

/// ggml's numbers of the kinds of tensors that are read.
const KINDS: [(u32, GgmlDType); 13] = [
    (0, GgmlDType::F32),
    (1, GgmlDType::F16),
    (2, GgmlDType::Q4_0),
    (3, GgmlDType::Q4_1),
    (6, GgmlDType::Q5_0),
    (7, GgmlDType::Q5_1),
    (8, GgmlDType::Q8_0),
    (10, GgmlDType::Q2K),
    (11, GgmlDType::Q3K),
    (12, GgmlDType::Q4K),
    (13, GgmlDType::Q5K),
    (14, GgmlDType::Q6K),
    (30, GgmlDType::BF16),
];

/// The kind of a tensor from ggml's number; the error is its name.
fn dtype(number: u32) -> std::result::Result<GgmlDType, String> {
    const OTHERS: [(u32, &str); 14] = [
        (16, "IQ2_XXS"),
        (17, "IQ2_XS"),
        (18, "IQ3_XXS"),
        (19, "IQ1_S"),
        (20, "IQ4_NL"),
        (21, "IQ3_S"),
        (22, "IQ2_S"),
        (23, "IQ4_XS"),
        (28, "F64"),
        (29, "IQ1_M"),
        (34, "TQ1_0"),
        (35, "TQ2_0"),
        (39, "MXFP4"),
        (40, "NVFP4"),
    ];
    let known = KINDS.iter().find(|(kind, _)| *kind == number);
    known.map(|(_, dtype)| *dtype).ok_or_else(|| {
        let name = OTHERS.iter().find(|(kind, _)| *kind == number);
        name.map_or_else(|| format!("type {number}"), |(_, name)| name.to_string())
    })
}

/// ggml's number of a kind, if it is read here.
pub fn number(dtype: GgmlDType) -> Option<u32> {
    KINDS.iter().find(|(_, kind)| *kind == dtype).map(|(number, _)| *number)
}

struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let bytes = self.at.checked_add(count).and_then(|end| self.file.get(self.at..end));
        let bytes = bytes.ok_or_else(|| format!("ends in the middle of its header, at byte {}", self.file.len()))?;
        self.at += count;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from(self.u32()?) | u64::from(self.u32()?) << 32)
    }

    /// A number of things that each take at least `size` bytes of what is left.
    fn count(&mut self, size: usize) -> Result<usize> {
        let count = self.u64()?;
        let room = (self.file.len() - self.at) / size;
        let fits = usize::try_from(count).ok().filter(|&count| count <= room);
        fits.ok_or_else(|| format!("states {count} entries at byte {} and has room for {room}", self.at))
    }

    fn text(&mut self) -> Result<&'a str> {
        let length = self.count(1)?;
        let at = self.at;
        std::str::from_utf8(self.take(length)?).map_err(|_| format!("has a string at byte {at} that is not UTF-8"))
    }

    fn value(&mut self, kind: u32) -> Result<Value<'a>> {
        let size = |kind: u32| match SCALAR_SIZES.get(kind as usize) {
            Some(&size) => Ok(size),
            None => Err(format!("has a value of kind {kind}, which is not known")),
        };
        match kind {
            STRING => Ok(Value::Text(self.text()?)),
            ARRAY => match self.u32()? {
                STRING => {
                    let count = self.count(8)?;
                    (0..count).map(|_| self.text()).collect::<Result<_>>().map(Value::Texts)
                }
                ARRAY => Err("has an array of arrays, which is not read".to_string()),
                kind => {
                    let size = size(kind)?;
                    let count = self.count(size)?;
                    Ok(Value::Numbers(Numbers { kind, bytes: self.take(count * size)? }))
                }
            },
            _ => Ok(scalar(kind, self.take(size(kind)?)?)),
        }
    }
}
