//! Generation: pieces of text as they come, what is kept from one prompt to the next, and adapters that change in between.
#![allow(missing_docs)]

mod common;

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use candle_core::{DType, Device};
use metal_candle::inference::{AdapterRegistry, End, GenerateOptions, Generation, Generator, KvCache, Sampling};
use metal_candle::models::decoder::Decoder;
use metal_candle::models::{ModelFiles, TextTokenizer};
use metal_candle::training::adapter::{AdapterFile, Module};

fn model() -> (TextTokenizer, Decoder) {
    let folder = tempfile::tempdir().unwrap();
    common::tiny::write_model(folder.path(), 1);
    let files = ModelFiles::open(folder.path().to_str().unwrap()).unwrap();
    let weights = files.weights(DType::F32, &Device::Cpu).unwrap();
    let decoder = Decoder::new(&files.config, weights, &Device::Cpu).unwrap();
    (files.tokenizer, decoder)
}

/// An adapter with values in both of its matrices, on every linear whose path ends so.
fn adapter(decoder: &Decoder, end: &str, seed: u64) -> AdapterFile {
    let linears = decoder.linears().filter(|(path, _)| path.ends_with(end));
    let modules: BTreeMap<_, _> = linears
        .enumerate()
        .map(|(index, (path, linear))| {
            let ((k, n), seed) = (linear.sizes(), 100 * seed + 2 * index as u64);
            let random = |shape: [usize; 2], seed| common::random(&shape, DType::F32, seed);
            let (a, b) = (random([k, 3], seed), random([3, n], seed + 1));
            (path, Module { a, b, scaling: 2.0, magnitude: None })
        })
        .collect();
    AdapterFile::new("tiny", decoder.config.num_layers, 0.0, modules)
}

fn drawing(seed: u64) -> GenerateOptions {
    let sampling = Sampling { temperature: 1.5, seed, ..Sampling::default() };
    GenerateOptions { max_tokens: 40, sampling, stop: Vec::new() }
}

fn generated(decoder: &Decoder, tokenizer: &TextTokenizer, options: &GenerateOptions) -> Generation {
    let prompt = tokenizer.encode("row 1", false).unwrap();
    let mut generator = Generator::new(decoder, tokenizer).unwrap();
    generator.generate(&prompt, options, &mut |_| ControlFlow::Continue(())).unwrap()
}

/// Parts of a generation that do not depend on the clock.
fn outcome(generation: &Generation) -> (&str, &[u32], End) {
    (&generation.text, &generation.tokens, generation.end)
}

#[test]
fn a_stream_gives_the_pieces_that_a_function_gets() {
    let (tokenizer, decoder) = model();
    let prompt = tokenizer.encode("row 1", false).unwrap();
    let mut split_characters = 0;
    for seed in 0..8 {
        let options = drawing(seed);
        let mut pieces = Vec::new();
        let mut generator = Generator::new(&decoder, &tokenizer).unwrap();
        let whole = generator.generate(&prompt, &options, &mut |piece| {
            pieces.push(piece.to_string());
            ControlFlow::Continue(())
        });
        let whole = whole.unwrap();
        let mut generator = Generator::new(&decoder, &tokenizer).unwrap();
        let mut stream = generator.stream(&prompt, &options);
        let streamed: Vec<String> = stream.by_ref().map(Result::unwrap).collect();
        assert!(stream.next().is_none());
        assert_eq!(outcome(&stream.finish()), outcome(&whole));
        assert_eq!((&streamed, streamed.concat()), (&pieces, whole.text.clone()));
        assert!(pieces.len() > 1, "the text came at once");
        let decoded = tokenizer.decode(&whole.tokens, true).unwrap();
        assert!(decoded.starts_with(whole.text.trim_end_matches('\u{fffd}')), "{decoded:?} {:?}", whole.text);
        split_characters += usize::from(pieces.len() < whole.tokens.len());
    }
    assert!(split_characters > 0, "no token was part of a character");
}

#[test]
fn a_character_comes_with_its_last_token() {
    let (tokenizer, _) = model();
    let ids = tokenizer.encode("a\u{1f980}é", false).unwrap();
    let mut stream = tokenizer.decode_stream();
    let pieces: Vec<Option<String>> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    let some = |text: &str| Some(text.to_string());
    // The vocabulary has no merges of these: four bytes, four tokens.
    assert_eq!(pieces, [some("a"), None, None, None, some("\u{1f980}"), None, some("é")]);
}

#[test]
fn a_stop_text_may_span_tokens_and_is_never_shown() {
    let (tokenizer, decoder) = model();
    let options = drawing(2);
    let whole = generated(&decoder, &tokenizer, &options);
    let characters: Vec<char> = whole.text.chars().collect();
    let plain = |window: &&[char]| !window.contains(&'\u{fffd}');
    let stop: String = characters[3..].windows(3).find(plain).unwrap().iter().collect();
    assert!(tokenizer.encode(&stop, false).unwrap().len() > 1, "{stop:?} is one token");
    let options = GenerateOptions { stop: vec!["never \u{1f980}".into(), stop.clone()], ..options };
    let prompt = tokenizer.encode("row 1", false).unwrap();
    let mut generator = Generator::new(&decoder, &tokenizer).unwrap();
    let mut stream = generator.stream(&prompt, &options);
    let shown: String = stream.by_ref().map(Result::unwrap).collect();
    let cut = &whole.text[..whole.text.find(&stop).unwrap()];
    assert_eq!((shown.as_str(), stream.finish().end), (cut, End::StopText));
}

#[test]
fn a_conversation_runs_only_what_is_new_and_says_the_same() {
    let (tokenizer, decoder) = model();
    let options = GenerateOptions { max_tokens: 6, ..GenerateOptions::default() };
    let mut kept = Generator::new(&decoder, &tokenizer).unwrap();
    let mut prompt = tokenizer.encode("row 1 of the data", false).unwrap();
    for turn in 0..3 {
        let quiet = &mut |_: &str| ControlFlow::Continue(());
        let warm = kept.generate(&prompt, &options, quiet).unwrap();
        let cold = Generator::new(&decoder, &tokenizer).unwrap().generate(&prompt, &options, quiet).unwrap();
        assert_eq!(outcome(&warm), outcome(&cold));
        assert_eq!(cold.prompt_tokens, prompt.len());
        let next = tokenizer.encode(" next row", false).unwrap();
        if turn > 0 {
            // The last token of the answer before, which nothing was asked after, and the turn.
            assert_eq!(warm.prompt_tokens, 1 + next.len());
        }
        prompt.extend(&warm.tokens);
        prompt.extend(next);
    }
}

#[test]
fn a_stream_that_is_dropped_leaves_the_generator_whole() {
    let (tokenizer, decoder) = model();
    let prompt = tokenizer.encode("row 1", false).unwrap();
    let mut generator = Generator::new(&decoder, &tokenizer).unwrap();
    let options = drawing(3);
    let mut stream = generator.stream(&prompt, &options);
    stream.next().unwrap().unwrap();
    let broken = stream.finish();
    assert_eq!(broken.end, End::Caller);
    drop(generator.stream(&prompt, &options));
    let again = generator.generate(&prompt, &options, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(outcome(&again), outcome(&generated(&decoder, &tokenizer, &options)));
    assert!(again.text.starts_with(&broken.text));
}

#[test]
fn what_cannot_be_generated_is_one_error_and_the_end() {
    let (tokenizer, decoder) = model();
    let mut generator = Generator::new(&decoder, &tokenizer).unwrap();
    let options = GenerateOptions::default();
    let wrong = GenerateOptions { stop: vec![String::new()], ..GenerateOptions::default() };
    for (prompt, options, word) in
        [(vec![], &options, "prompt"), (vec![1; 256], &options, "256"), (vec![1], &wrong, "stop")]
    {
        let mut stream = generator.stream(&prompt, options);
        let error = stream.next().unwrap().unwrap_err().to_string();
        assert!(error.contains(word) && stream.next().is_none(), "{error}");
    }
    let none = GenerateOptions { max_tokens: 0, ..GenerateOptions::default() };
    let mut stream = generator.stream(&[1], &none);
    assert!(stream.next().is_none());
    assert_eq!(stream.finish().end, End::MaxTokens);
}

#[test]
fn a_penalty_and_the_cuts_of_the_distribution_reach_the_text() {
    let (tokenizer, decoder) = model();
    let base = drawing(5);
    let text = |change: fn(&mut Sampling)| {
        let mut options = base.clone();
        change(&mut options.sampling);
        generated(&decoder, &tokenizer, &options).tokens
    };
    let greedy = text(|sampling| sampling.temperature = 0.0);
    let free = text(|_| ());
    assert_ne!(free, greedy);
    assert_eq!(text(|sampling| sampling.top_k = 1), greedy);
    assert_eq!(text(|sampling| sampling.min_p = 1.0), greedy);
    assert_eq!(text(|sampling| sampling.top_p = 1e-9), greedy);
    assert_ne!(text(|sampling| sampling.seed = 6), free);
    let repeats = |tokens: &[u32]| tokens.len() - tokens.iter().collect::<std::collections::BTreeSet<_>>().len();
    let varied = text(|sampling| (sampling.temperature, sampling.repetition_penalty) = (0.0, 50.0));
    assert!(repeats(&varied) < repeats(&greedy), "{varied:?} {greedy:?}");
}

#[test]
fn the_active_adapter_decides_and_each_is_as_if_it_were_alone() {
    let (tokenizer, decoder) = model();
    let options = GenerateOptions { max_tokens: 12, ..GenerateOptions::default() };
    let files = [("one", adapter(&decoder, "q_proj", 1)), ("two", adapter(&decoder, "_proj", 2))];
    let bare = generated(&decoder, &tokenizer, &options).tokens;
    let alone: Vec<Vec<u32>> = files
        .iter()
        .map(|(_, file)| {
            let (_, mut decoder) = model();
            file.attach(&mut decoder, &Device::Cpu).unwrap();
            generated(&decoder, &tokenizer, &options).tokens
        })
        .collect();
    assert!(alone[0] != bare && alone[1] != bare && alone[0] != alone[1]);

    let mut registry = AdapterRegistry::new(decoder).unwrap();
    for (name, file) in &files {
        registry.add(name, file).unwrap();
    }
    assert_eq!((registry.list().collect::<Vec<_>>(), registry.active()), (vec!["one", "two"], None));
    for (name, expected) in [(None, &bare), (Some("two"), &alone[1]), (Some("one"), &alone[0]), (None, &bare)] {
        registry.activate(name).unwrap();
        assert_eq!(registry.active(), name);
        assert_eq!(&generated(registry.decoder(), &tokenizer, &options).tokens, expected, "{name:?}");
    }
    registry.activate(Some("two")).unwrap();
    registry.remove("one").unwrap();
    assert_eq!((registry.list().collect::<Vec<_>>(), registry.active()), (vec!["two"], Some("two")));
    assert_eq!(generated(registry.decoder(), &tokenizer, &options).tokens, alone[1]);
    registry.remove("two").unwrap();
    assert_eq!(registry.active(), None);
    assert_eq!(generated(registry.decoder(), &tokenizer, &options).tokens, bare);
}

#[test]
fn an_activation_copies_nothing() {
    let (_, decoder) = model();
    let file = adapter(&decoder, "q_proj", 1);
    let mut registry = AdapterRegistry::new(decoder).unwrap();
    registry.add("one", &file).unwrap();
    let id = |registry: &AdapterRegistry| {
        let (_, linear) = registry.decoder().linears().find(|(path, _)| path.ends_with("q_proj")).unwrap();
        linear.adapter.as_ref().unwrap().a.value.id()
    };
    registry.activate(Some("one")).unwrap();
    let first = id(&registry);
    registry.activate(None).unwrap();
    registry.activate(Some("one")).unwrap();
    assert_eq!(first, id(&registry));
}

#[test]
fn a_registry_refuses_by_name_and_stays_as_it_was() {
    let (_, decoder) = model();
    let good = adapter(&decoder, "q_proj", 1);
    let mut strange = good.clone();
    let module = strange.modules.values().next().unwrap().clone();
    strange.modules.insert("model.layers.7.self_attn.q_proj".into(), module.clone());
    strange.modules.insert("model.layers.0.mlp.down_proj".into(), module);
    let mut registry = AdapterRegistry::new(decoder).unwrap();
    let refused = |result: metal_candle::Result<()>, words: &[&str]| {
        let error = result.unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    refused(registry.activate(Some("x")), &["'x'", "there are none"]);
    registry.add("good", &good).unwrap();
    registry.activate(Some("good")).unwrap();
    refused(registry.add("good", &good), &["'good'", "taken"]);
    refused(registry.add("", &good), &["empty"]);
    refused(registry.add("bad", &strange), &["'bad'", "layers.7.self_attn.q_proj", "layers.0.mlp.down_proj"]);
    refused(registry.activate(Some("bad")), &["'bad'", "there are good"]);
    refused(registry.remove("bad"), &["'bad'", "there are good"]);
    assert_eq!((registry.list().collect::<Vec<_>>(), registry.active()), (vec!["good"], Some("good")));
}

#[test]
fn keys_of_another_adapter_or_model_are_refused() {
    let (_, mut decoder) = model();
    let (_, other) = model();
    let file = adapter(&decoder, "q_proj", 1);
    let mut cache = KvCache::new(&decoder.config, DType::F32, &Device::Cpu).unwrap();
    let first = |logits: candle_core::Tensor| logits.to_vec1::<f32>().unwrap()[0];
    decoder.forward_cached(&[1, 2], &mut cache).unwrap();
    decoder.forward_cached(&[3], &mut cache).unwrap();
    let bare = first(decoder.forward_cached(&[4], &mut cache).unwrap());
    assert!(other.forward_cached(&[5], &mut cache).unwrap_err().to_string().contains("clear it"));
    file.attach(&mut decoder, &Device::Cpu).unwrap();
    assert!(decoder.forward_cached(&[5], &mut cache).unwrap_err().to_string().contains("clear it"));
    assert_eq!(cache.len(), 4);
    cache.clear();
    let adapted = first(decoder.forward_cached(&[1, 2, 3, 4], &mut cache).unwrap());
    assert!((adapted - bare).abs() > 1e-3, "{adapted} {bare}");
    decoder.attach("model.layers.0.self_attn.q_proj", None).unwrap();
    assert!(decoder.forward_cached(&[5], &mut cache).is_err());
    cache.clear();
    decoder.parameters_mut();
    decoder.forward_cached(&[1], &mut cache).unwrap();
    for path in ["model.layers.9.self_attn.q_proj", "model.layers.0.q_proj", "model.layers.x.mlp.up_proj", "lm_head"] {
        assert!(decoder.attach(path, None).unwrap_err().to_string().contains(path));
    }
    assert!(decoder.set_adapters(&Default::default()).is_err());
}
