//! Writes a GGUF container, version 3: the header, then each tensor's bytes as they are made, so that no more than one is in memory.

use std::io::{self, Write};

use candle_core::quantized::GgmlDType;

use super::container::{DEFAULT_ALIGNMENT, kind, number};

/// Keys with their values as bytes.
#[derive(Debug, Default)]
pub struct Pairs(Vec<(String, Vec<u8>)>);

impl Pairs {
    /// A value as it stands in a file, its kind before it.
    pub fn raw(&mut self, key: &str, value: &[u8]) {
        self.0.push((key.to_string(), value.to_vec()));
    }

    pub fn u32(&mut self, key: &str, value: u32) {
        self.scalar(key, kind::U32, value.to_le_bytes());
    }

    pub fn f32(&mut self, key: &str, value: f32) {
        self.scalar(key, kind::F32, value.to_le_bytes());
    }

    pub fn flag(&mut self, key: &str, value: bool) {
        self.scalar(key, kind::BOOL, [u8::from(value)]);
    }

    pub fn text(&mut self, key: &str, value: &str) {
        let mut bytes = kind::STRING.to_le_bytes().to_vec();
        push_text(&mut bytes, value);
        self.0.push((key.to_string(), bytes));
    }

    pub fn texts<T: AsRef<str>>(&mut self, key: &str, values: &[T]) {
        let mut bytes = array(kind::STRING, values.len());
        values.iter().for_each(|value| push_text(&mut bytes, value.as_ref()));
        self.0.push((key.to_string(), bytes));
    }

    pub fn i32s(&mut self, key: &str, values: &[i32]) {
        let mut bytes = array(kind::I32, values.len());
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        self.0.push((key.to_string(), bytes));
    }

    pub fn f32s(&mut self, key: &str, values: &[f32]) {
        let mut bytes = array(kind::F32, values.len());
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        self.0.push((key.to_string(), bytes));
    }

    fn scalar<const N: usize>(&mut self, key: &str, kind: u32, value: [u8; N]) {
        self.0.push((key.to_string(), [&kind.to_le_bytes()[..], &value].concat()));
    }
}

fn array(kind: u32, count: usize) -> Vec<u8> {
    let mut bytes = kind::ARRAY.to_le_bytes().to_vec();
    bytes.extend(kind.to_le_bytes());
    bytes.extend((count as u64).to_le_bytes());
    bytes
}

fn push_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

/// A tensor that is to come.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// llama.cpp's name.
    pub name: String,
    /// Slowest dimension first; the file has it the other way round.
    pub shape: Vec<usize>,
    /// Of a kind that [`number`] knows, whose blocks make up a row.
    pub dtype: GgmlDType,
}

impl TensorInfo {
    /// The bytes of its data.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() / self.dtype.block_size() * self.dtype.type_size()
    }
}

/// A file whose header is written and whose tensors come in the header's order.
pub struct Writer<W> {
    out: W,
    tensors: Vec<TensorInfo>,
    written: usize,
}

impl<W: Write> Writer<W> {
    /// Writes the header.
    pub fn begin(mut out: W, pairs: &Pairs, tensors: Vec<TensorInfo>) -> io::Result<Self> {
        let mut header = b"GGUF".to_vec();
        header.extend(3u32.to_le_bytes());
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend((pairs.0.len() as u64).to_le_bytes());
        for (key, value) in &pairs.0 {
            push_text(&mut header, key);
            header.extend(value);
        }
        let mut offset = 0;
        for tensor in &tensors {
            push_text(&mut header, &tensor.name);
            header.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().rev().for_each(|&size| header.extend((size as u64).to_le_bytes()));
            let number = number(tensor.dtype).ok_or_else(|| invalid(tensor, "is of a kind without a number"))?;
            header.extend(number.to_le_bytes());
            header.extend((offset as u64).to_le_bytes());
            offset += aligned(tensor.bytes());
        }
        header.resize(aligned(header.len()), 0);
        out.write_all(&header)?;
        Ok(Self { out, tensors, written: 0 })
    }

    /// Writes the next tensor's data.
    ///
    /// # Errors
    /// Another tensor than is next, or other bytes than it takes.
    pub fn tensor(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let next = self.tensors.get(self.written).filter(|next| next.name == name);
        let next = next.ok_or_else(|| io::Error::other(format!("tensor {name} comes out of its turn")))?;
        if next.bytes() != bytes.len() {
            return Err(invalid(next, &format!("has {} bytes, not {}", bytes.len(), next.bytes())));
        }
        self.out.write_all(bytes)?;
        self.out.write_all(&vec![0; aligned(bytes.len()) - bytes.len()])?;
        self.written += 1;
        Ok(())
    }

    /// Writes out what is still buffered.
    ///
    /// # Errors
    /// Tensors that have not come.
    pub fn finish(mut self) -> io::Result<()> {
        match self.tensors.get(self.written) {
            None => self.out.flush(),
            Some(missing) => Err(invalid(missing, "has not come")),
        }
    }
}

fn invalid(tensor: &TensorInfo, problem: &str) -> io::Error {
    io::Error::other(format!("tensor {} {problem}", tensor.name))
}

fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(DEFAULT_ALIGNMENT as usize)
}

#[cfg(test)]
mod tests {
    use super::super::container::{Container, Value};
    use super::*;

    fn info(name: &str, shape: &[usize], dtype: GgmlDType) -> TensorInfo {
        TensorInfo { name: name.to_string(), shape: shape.to_vec(), dtype }
    }

    #[test]
    fn what_is_written_is_read() {
        let mut pairs = Pairs::default();
        pairs.u32("a.u32", 7);
        pairs.f32("a.f32", 0.5);
        pairs.flag("a.flag", true);
        pairs.text("a.text", "naïve");
        pairs.texts("a.texts", &["x", "", "zz"]);
        pairs.i32s("a.i32s", &[-1, 2]);
        pairs.f32s("a.f32s", &[1.5]);
        let tensors = vec![info("t", &[3], GgmlDType::F32), info("q", &[2, 32], GgmlDType::Q8_0)];
        let data: [Vec<u8>; 2] = [(0..12).collect(), (0..68).collect()];
        let mut file = Vec::new();
        let mut writer = Writer::begin(&mut file, &pairs, tensors.clone()).unwrap();
        writer.tensor("t", &data[0]).unwrap();
        writer.tensor("q", &data[1]).unwrap();
        writer.finish().unwrap();

        let container = Container::parse(&file).unwrap();
        assert_eq!(container.get("a.u32"), Some(&Value::Unsigned(7)));
        assert_eq!(container.get("a.f32"), Some(&Value::Float(0.5)));
        assert_eq!(container.get("a.flag"), Some(&Value::Bool(true)));
        assert_eq!(container.get("a.text"), Some(&Value::Text("naïve")));
        assert_eq!(container.get("a.texts"), Some(&Value::Texts(vec!["x", "", "zz"])));
        let Some(Value::Numbers(numbers)) = container.get("a.i32s") else { panic!("no array") };
        assert_eq!(numbers.iter().collect::<Vec<_>>(), [Value::Signed(-1), Value::Signed(2)]);
        for (tensor, (info, data)) in container.tensors.iter().zip(tensors.iter().zip(&data)) {
            assert_eq!((tensor.name, &tensor.shape, tensor.dtype), (info.name.as_str(), &info.shape, info.dtype));
            assert_eq!(tensor.data, data);
        }
        // Carried as bytes, the pairs are the same again.
        let mut again = Pairs::default();
        container.raw_pairs().for_each(|(key, value)| again.raw(key, value));
        assert_eq!(again.0, pairs.0);
    }

    #[test]
    fn tensors_out_of_turn_of_another_size_or_missing_are_errors() {
        let tensors = vec![info("t", &[3], GgmlDType::F32)];
        let begin = || Writer::begin(Vec::new(), &Pairs::default(), tensors.clone()).unwrap();
        assert!(begin().tensor("q", &[0; 12]).unwrap_err().to_string().contains("tensor q"));
        assert!(begin().tensor("t", &[0; 13]).unwrap_err().to_string().contains("13 bytes, not 12"));
        assert!(begin().finish().unwrap_err().to_string().contains("t has not come"));
    }
}
