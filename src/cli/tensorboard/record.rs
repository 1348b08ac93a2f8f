//! TFRecord framing and the little of protobuf's wire format that events need.
//!
//! A record is `length: u64, masked CRC of length: u32, data, masked CRC of data: u32`, little-endian
//! (tensorflow/core/lib/io/record_writer.h). The CRC is CRC-32C (RFC 3720, Castagnoli), masked so that a CRC of data with CRCs in
//! it keeps its strength.

/// Castagnoli's polynomial, reversed.
const POLYNOMIAL: u32 = 0x82f6_3b78;

const TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ POLYNOMIAL } else { crc >> 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
}

fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc: u32, &byte| crc >> 8 ^ TABLE[(crc as u8 ^ byte) as usize])
}

fn masked_crc(bytes: &[u8]) -> [u8; 4] {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// A record of these bytes.
pub fn framed(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length), data, &masked_crc(data)].concat()
}

/// A protobuf message, field after field.
#[derive(Default)]
pub struct Message(Vec<u8>);

impl Message {
    /// Without fields.
    pub fn new() -> Self {
        Self::default()
    }

    /// An int64 (not negative) or an enum.
    pub fn varint(mut self, field: u32, value: u64) -> Self {
        self.key(field, 0);
        self.number(value);
        self
    }

    /// A double.
    pub fn double(mut self, field: u32, value: f64) -> Self {
        self.key(field, 1);
        self.0.extend(value.to_le_bytes());
        self
    }

    /// A string or bytes.
    pub fn bytes(mut self, field: u32, value: &[u8]) -> Self {
        self.key(field, 2);
        self.number(value.len() as u64);
        self.0.extend(value);
        self
    }

    /// A message within.
    pub fn message(self, field: u32, value: Message) -> Self {
        self.bytes(field, &value.0)
    }

    /// A float.
    pub fn float(mut self, field: u32, value: f32) -> Self {
        self.key(field, 5);
        self.0.extend(value.to_le_bytes());
        self
    }

    /// As it goes over the wire.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    fn key(&mut self, field: u32, wire_type: u32) {
        self.number((field << 3 | wire_type) as u64);
    }

    /// Seven bits a byte, the lowest first; the eighth says that more follow.
    fn number(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 3720, B.4.
    #[test]
    fn known_crcs() {
        let rising: Vec<u8> = (0..32).collect();
        let falling: Vec<u8> = (0..32).rev().collect();
        let mut read_command = [0; 48];
        for (at, value) in
            [(0, 0x01), (1, 0xc0), (16, 0x14), (22, 0x04), (27, 0x14), (31, 0x18), (32, 0x28), (40, 0x02)]
        {
            read_command[at] = value;
        }
        let cases: [(&[u8], u32); 6] = [
            (&[0; 32], 0x8a91_36aa),
            (&[0xff; 32], 0x62a8_ab43),
            (&rising, 0x46dd_794e),
            (&falling, 0x113f_db5c),
            (&read_command, 0xd996_3a56),
            (b"123456789", 0xe306_9283),
        ];
        for (bytes, crc) in cases {
            assert_eq!(crc32c(bytes), crc, "{bytes:?}");
        }
    }

    #[test]
    fn a_record_is_framed() {
        let record = framed(b"abc");
        assert_eq!(&record[..8], &[3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(
            (&record[8..12], &record[12..15], &record[15..]),
            (&masked_crc(&record[..8])[..], &b"abc"[..], &masked_crc(b"abc")[..])
        );
        // As TensorBoard computes them.
        assert_eq!(
            (masked_crc(b"abc"), masked_crc(&record[..8])),
            (0x21f1_576e_u32.to_le_bytes(), 0x0e49_99b0_u32.to_le_bytes())
        );
    }

    #[test]
    fn fields_are_on_the_wire_as_protobuf_has_them() {
        let message = Message::new().varint(1, 150).bytes(2, b"testing").message(3, Message::new().varint(1, 150));
        assert_eq!(message.into_bytes(), b"\x08\x96\x01\x12\x07testing\x1a\x03\x08\x96\x01");
        assert_eq!(
            Message::new().double(1, 1.0).float(16, 1.0).into_bytes(),
            b"\x09\0\0\0\0\0\0\xf0\x3f\x85\x01\0\0\x80\x3f"
        );
    }
}
