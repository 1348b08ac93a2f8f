//! Whether two tokenizers give the same tokens.

use crate::Result;
use crate::models::TextTokenizer;

/// What ways of cutting a text differ in: spaces, digits, apostrophes, line ends, letters of many scripts, marks.
const TEXTS: [&str; 16] = [
    "",
    " ",
    "Hello world  and   more",
    "I'm sure they'll DON'T 'S it's we've",
    "12345 3.14159 1,000,000 x86 ½ Ⅷ ٣٤",
    "tab\tand\nline\r\n\r\n  mixed \n\n\n x\n",
    "naïve café ÀÉ ﬁ ℃",
    "combining e\u{301} a\u{308} \u{1100}\u{1161}",
    "日本語のテキスト。中文字符",
    "🦀🚀 emoji 👩‍👩‍👧!",
    "def f(x):\n    return x**2  # y\n",
    "http://a.b/c?d=e&f=%20",
    "مرحبا Привет, हिन्दी 한국어",
    "....!!!???---___ $+<=>^~|",
    "CamelCase HTTPServer ABCdef",
    "\u{a0}nbsp\u{2003}em\u{200b}zw   ",
];

/// The tokens that are decoded together into a text.
const TOGETHER: usize = 64;

/// Compares the tokens of [`TEXTS`], of texts out of all tokens, and of each added token among words. With `other_prefix` spaces at the
/// beginning of a text and added tokens stay out. The error shows the first text that differs.
pub fn same_tokens(one: &TextTokenizer, other: &TextTokenizer, other_prefix: bool) -> Result<(), String> {
    let words = one.added_tokens();
    let plain: Vec<u32> =
        (0..one.vocab_size() as u32).filter(|id| !words.iter().any(|(added, _)| added == id)).collect();
    let joined = plain.chunks(TOGETHER).map(|ids| one.decode(ids, true));
    let joined: Vec<String> = joined.collect::<Result<_>>().map_err(|error| error.to_string())?;
    let among = words.iter().filter(|_| !other_prefix).map(|(_, text)| format!("a{text}b {text} c"));
    for text in TEXTS.iter().map(|text| text.to_string()).chain(joined).chain(among) {
        let text = if other_prefix { text.trim_start_matches(' ') } else { &text };
        for special in [false, true] {
            let encode = |tokenizer: &TextTokenizer| tokenizer.encode(text, special).map_err(|error| error.to_string());
            let (wanted, found) = (encode(one)?, encode(other)?);
            if wanted != found {
                let at = wanted.iter().zip(&found).take_while(|(wanted, found)| wanted == found).count();
                let from = |ids: &[u32]| ids[at..ids.len().min(at + 8)].to_vec();
                return Err(format!(
                    "the written tokenizer cuts {:?} otherwise: from its token {at} on into {:?}, not {:?}",
                    text.chars().take(80).collect::<String>(),
                    from(&found),
                    from(&wanted)
                ));
            }
        }
    }
    Ok(())
}
