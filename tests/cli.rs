//! The program from the outside: what it prints, writes, refuses.
#![allow(missing_docs)]

mod common;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::{good, refused};
use serde_json::Value;

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    /// A folder with `model` (that speaks ChatML) and `data`.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        common::tiny::write_model(&model, 1);
        let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}\
                        {% if add_generation_prompt %}<assistant>{% endif %}";
        fs::write(model.join("chat_template.jinja"), template).unwrap();
        let data = folder.path().join("data");
        fs::create_dir(&data).unwrap();
        let row = |i: usize| format!("{{\"prompt\": \"row {i}\", \"completion\": \"value {}\"}}\n", i % 3);
        fs::write(data.join("train.jsonl"), (0..12).map(row).collect::<String>()).unwrap();
        fs::write(data.join("valid.jsonl"), (20..24).map(row).collect::<String>()).unwrap();
        fs::write(data.join("test.jsonl"), (30..33).map(row).collect::<String>()).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, args: &str) -> Output {
        self.run_with(args, "")
    }

    fn run_with(&self, args: &str, input: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_metal-candle"));
        command.args(args.split(' ')).current_dir(self.folder.path());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // A program that refuses its flags has closed its input.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        child.wait_with_output().unwrap()
    }
}

const TRAIN: &str = "train --model model --data data --rank 3 --alpha 5 --iters 8 --batch-size 3 --learning-rate 0.02";

#[test]
fn train_writes_an_adapter_metrics_and_a_plot_that_the_others_use() {
    let place = Place::new();
    let told = good(&place.run(&format!("{TRAIN} --mask-prompt --steps-per-report 2 --steps-per-eval 4 --test")));
    for words in ["8 steps over 12 rows", "step 8/8: loss", "validation loss", "tokens/s", "test loss", "peak"] {
        assert!(told.contains(words), "'{words}' is missing: {told}");
    }
    let adapter = place.path("adapters");
    for file in ["adapter_model.safetensors", "adapter_config.json", "loss.svg", "checkpoints/step-0000008/state.json"]
    {
        assert!(adapter.join(file).is_file(), "{file}");
    }
    let lines: Vec<Value> = fs::read_to_string(adapter.join("metrics.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let steps = |key: &str| -> Vec<u64> {
        lines.iter().filter(|line| line.get(key).is_some()).map(|line| line["step"].as_u64().unwrap()).collect()
    };
    assert_eq!((steps("train_loss"), steps("val_loss")), (vec![2, 4, 6, 8], vec![0, 4, 8]));
    let config: Value = serde_json::from_slice(&fs::read(adapter.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!((&config["r"], &config["lora_alpha"], &config["peft_type"]), (&3.into(), &5.into(), &"LORA".into()));

    let base = good(&place.run("eval --model model --data data --mask-prompt"));
    let tuned = good(&place.run("eval --adapter-path adapters --data data --mask-prompt --exact-match --show 2"));
    let loss = |text: &str| -> f64 { text.split("loss ").nth(1).unwrap().split(',').next().unwrap().parse().unwrap() };
    assert!(loss(&tuned) < loss(&base) - 0.01, "{tuned} {base}");
    assert!(tuned.contains("exact match: ") && tuned.contains(" of 3") && tuned.contains("expected  value"), "{tuned}");

    let one = good(&place.run("generate --adapter-path adapters --prompt row --max-tokens 12"));
    let other = good(&place.run("generate --model model --prompt row --max-tokens 12"));
    assert!(!one.trim().is_empty() && one != other, "{one} {other}");
    let info = good(&place.run("info --model model --adapter-path adapters"));
    for words in ["llama", "rank           3", "scaling 1.66", "chat template  yes"] {
        assert!(info.contains(words), "'{words}' is missing: {info}");
    }
}

#[test]
fn generate_reads_standard_input_and_draws_by_its_seed() {
    let place = Place::new();
    let draw = |seed: u32| good(&place.run(&format!("generate --model model -p row -m 20 --temp 1.5 --seed {seed}")));
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
    let piped = good(&place.run_with("generate --model model -p - -m 20", "row\n"));
    assert_eq!(piped, good(&place.run("generate --model model -p row -m 20")));
    let plain = good(&place.run("generate --model model -p row -m 20 --ignore-chat-template"));
    assert_ne!(piped, plain);
}

#[test]
fn a_conversation_goes_on_and_begins_anew() {
    let place = Place::new();
    let turns = good(&place.run_with("chat --model model -m 8", "row 1\nrow 1\n/clear\nrow 1\n/what\n/exit\nnever\n"));
    let answers: Vec<&str> = turns.lines().collect();
    assert_eq!(answers.len(), 3, "{turns}");
    assert_eq!(answers[0], answers[2]);
    let fresh = good(&place.run("generate --model model -m 8 -p row"));
    assert!(!fresh.is_empty());
}

#[test]
fn reports_go_to_event_files_when_asked() {
    let place = Place::new();
    let train = format!("{TRAIN} --steps-per-report 2");
    good(&place.run(&train));
    assert!(!place.path("adapters/runs").exists());
    let events = |adapter: &str| -> Vec<Vec<u8>> {
        let files = fs::read_dir(place.path(adapter).join("runs")).unwrap();
        files.map(|file| fs::read(file.unwrap().path()).unwrap()).collect()
    };
    good(&place.run(&format!("{train} --report-to tensorboard --adapter-path told")));
    let count = |bytes: &[u8], tag: &str| bytes.windows(tag.len()).filter(|window| *window == tag.as_bytes()).count();
    let [file] = &events("told")[..] else { panic!("one process writes one file") };
    let metrics = fs::read_to_string(place.path("told/metrics.jsonl")).unwrap();
    for (tag, key) in
        [("train/loss", "\"train_loss\""), ("train/grad_norm", "\"grad_norm\""), ("eval/loss", "\"val_loss\"")]
    {
        assert_eq!((count(file, tag), metrics.matches(key).count() > 0), (metrics.matches(key).count(), true), "{tag}");
    }
    good(&place.run(&format!("{train} --report-to tensorboard --adapter-path told --resume")));
    assert_eq!(events("told").len(), 2);
    fs::create_dir(place.path("full")).unwrap();
    fs::write(place.path("full/runs"), "").unwrap();
    refused(&place.run(&format!("{train} --report-to tensorboard --adapter-path full")), 1, &["full/runs"]);
    refused(&place.run(&format!("{train} --report-to wandb")), 2, &["wandb", "only tensorboard"]);
}

#[test]
fn several_adapters_over_one_model() {
    let place = Place::new();
    let train = TRAIN.replace("--learning-rate 0.02", "--learning-rate 0.3");
    good(&place.run(&format!("{train} --adapter-path runs/one")));
    good(&place.run(&format!("{train} --seed 7 --adapter-path runs/two")));
    let answer = |args: &str| place.run(&format!("generate {args} -p row -m 12"));
    let bare = good(&answer("--model model"));
    let one = good(&answer("--adapter-path runs/one"));
    let two = good(&answer("--adapter-path runs/two"));
    assert!(bare != one && one != two && bare != two, "{bare} {one} {two}");

    const BOTH: &str = "--adapter-path runs/one --adapter-path b=runs/two";
    let unpicked = answer(BOTH);
    assert_eq!(good(&unpicked), one);
    let told = String::from_utf8_lossy(&unpicked.stderr).into_owned();
    assert!(told.contains("adapter one is active") && told.contains("one, b"), "{told}");
    let picked = answer(&format!("{BOTH} --adapter b"));
    assert_eq!((good(&picked), picked.stderr.len()), (two, 0));
    assert_eq!(good(&answer(&format!("{BOTH} --adapter none"))), bare);
    refused(&answer(&format!("{BOTH} --adapter c")), 1, &["'c'", "one, b"]);
    refused(&answer("--adapter-path runs/one --adapter-path one=runs/two"), 1, &["'one'", "taken"]);
    refused(&answer("--adapter-path none=runs/one"), 2, &["none=runs/one", "none stands for no adapter"]);
    refused(&answer("--model model --adapter one"), 1, &["'one'", "there are none"]);
    refused(&answer("--adapter-path b=runs/three"), 1, &["runs/three"]);

    // The same turn under each adapter in turn; the conversation before it is the same each time.
    let script =
        "/adapters\n/adapter b\nrow\n/clear\n/adapter none\nrow\n/clear\n/adapter one\nrow\n/adapters\n/adapter x\n";
    let chat = place.run_with(&format!("chat {BOTH} -m 12"), script);
    let said = good(&chat);
    let lone = |name: &str| {
        let alone = good(&place.run_with(&format!("chat {BOTH} --adapter {name} -m 12"), "row\n"));
        alone.strip_suffix('\n').unwrap().to_string()
    };
    let expected = ["* one\n  b\n  none", &lone("b"), &lone("none"), &lone("one"), "* one\n  b\n  none\n"].join("\n");
    assert_eq!(said, expected);
    assert!(lone("b") != lone("one") && lone("b") != lone("none"));
    let told = String::from_utf8_lossy(&chat.stderr).into_owned();
    for words in ["adapter b is active", "adapter none is active", "/adapter x: is not there; there are one, b, none"] {
        assert!(told.contains(words), "'{words}' is missing: {told}");
    }
}

#[test]
fn a_conversation_is_shown_saved_and_loaded() {
    let place = Place::new();
    let script = "row 1\n/history\n/save talk.jsonl\nrow 2\n/save talk.jsonl\n";
    let said = good(&place.run_with("chat --model model -m 6 --system-prompt brief", script));
    assert!(said.contains("system: brief\nuser: row 1\nassistant: "), "{said}");
    let text = fs::read_to_string(place.path("talk.jsonl")).unwrap();
    let row: Value = serde_json::from_str(&text).unwrap();
    let turns: Vec<(&str, &str)> = row["messages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|turn| (turn["role"].as_str().unwrap(), turn["content"].as_str().unwrap()))
        .collect();
    assert_eq!(
        (turns.len(), turns[0], turns[1], turns[3]),
        (5, ("system", "brief"), ("user", "row 1"), ("user", "row 2"))
    );
    assert_eq!(text.lines().count(), 1);

    // Going on from the file is going on from the conversation.
    let whole = place.run_with("chat --model model -m 6 --system-prompt brief", "row 1\nrow 2\nrow 3\n/history\n");
    let loaded = place.run_with("chat --model model -m 6", "/load talk.jsonl\nrow 3\n/history\n");
    let history = |output: &Output| good(output).split_once("system: brief\n").unwrap().1.to_string();
    assert_eq!(history(&loaded), history(&whole));
    // What is saved can be trained on.
    good(&place.run("train --model model --data talk.jsonl --iters 1"));

    fs::write(place.path("pair.jsonl"), "{\"prompt\": \"a\", \"completion\": \"b\"}\n").unwrap();
    fs::write(place.path("two.jsonl"), text.repeat(2)).unwrap();
    fs::write(place.path("more.jsonl"), text.replace("{\"messages", "{\"id\":1,\"messages")).unwrap();
    let script = "/save new.jsonl\n/load pair.jsonl\n/load two.jsonl\n/load more.jsonl\n/load nothing.jsonl\n/load\n/what 1\n\
                  /clear x\nrow\n/save two.jsonl\n/history\n";
    let output = place.run_with("chat --model model -m 2", script);
    let said = good(&output);
    assert_eq!(said.matches("user: row").count(), 1, "{said}");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    for words in [
        "new.jsonl: is not written",
        "pair.jsonl: is not a conversation",
        "two.jsonl: has 2 rows",
        "more.jsonl: has keys that would be lost: id",
        "nothing.jsonl: ",
        "/load: takes a file",
        "/what: is not known; there are /clear, /history, /save FILE",
        "/clear: takes nothing, not 'x'",
        "two.jsonl: is there already",
    ] {
        assert!(told.contains(words), "'{words}' is missing: {told}");
    }
    assert_eq!(fs::read_to_string(place.path("two.jsonl")).unwrap(), text.repeat(2));
}

#[test]
fn a_config_file_is_read_and_its_unknown_keys_named() {
    let place = Place::new();
    let config = "model: model\ndata: data\nrank: 2\niters: 4\nbatch_size: 2\nmask_prompt: true\n";
    fs::write(place.path("run.yaml"), config).unwrap();
    good(&place.run("train --config run.yaml --rank 5"));
    let written: Value =
        serde_json::from_slice(&fs::read(place.path("adapters/adapter_config.json")).unwrap()).unwrap();
    assert_eq!(written["r"], 5);
    let dry = good(&place.run("train --config run.yaml --dry-run"));
    assert!(dry.contains("rank: 2") && dry.contains("iters: 4"), "{dry}");
    assert!(dry.contains("# largest batch_size: any; all 12 rows") && dry.contains("again: 0 of 2"), "{dry}");
    // What is printed is a configuration file.
    fs::write(place.path("printed.yaml"), &dry).unwrap();
    assert_eq!(
        dry.split("# memory").next(),
        good(&place.run("train --config printed.yaml --dry-run")).split("# memory").next()
    );
    let bare = good(&place.run("train --dry-run"));
    assert!(bare.contains("# largest batch_size") && !place.path("metal-candle-demo").exists(), "{bare}");
    refused(&place.run("train --config run.yaml --grad-checkpoint some"), 2, &["none", "every", "auto"]);
    fs::write(place.path("mlx.yaml"), format!("{config}grad_checkpoint: true\n")).unwrap();
    assert!(good(&place.run("train --config mlx.yaml --dry-run")).contains("again: 2 of 2"));
    fs::write(place.path("bad.yaml"), format!("{config}grad_checkpoint: 3\n")).unwrap();
    refused(&place.run("train --config bad.yaml"), 1, &["grad_checkpoint", "none, every or auto"]);
    fs::write(place.path("bad.yaml"), format!("{config}itres: 3\nfoo: 1\n")).unwrap();
    refused(&place.run("train --config bad.yaml"), 1, &["itres (did you mean iters?)", "foo", "bad.yaml"]);
}

#[test]
fn what_cannot_be_done_is_refused_by_name() {
    let place = Place::new();
    refused(&place.run("train --model model"), 1, &["--data"]);
    refused(&place.run("train --data data"), 1, &["--model"]);
    refused(&place.run(&format!("{TRAIN} --learning-rat 1")), 2, &["--learning-rat"]);
    refused(&place.run(&format!("{TRAIN} --target-modules q_proj,queries")), 1, &["queries", "q_proj"]);
    refused(&place.run(&format!("{TRAIN} --dropout 1.5 --min-lr-ratio 7")), 1, &["dropout", "min_lr_ratio"]);
    refused(&place.run("generate --model nowhere/at-all/here -p x"), 1, &["nowhere/at-all/here"]);
    refused(&place.run("generate --model model -p x --top-k 3"), 1, &["--temp", "--top-k"]);
    refused(&place.run("generate --model model -p x --temp -1 --top-p 0"), 1, &["temperature is -1", "top_p"]);
    refused(&place.run("eval --model model --data data --exact-match"), 2, &["--mask-prompt"]);
    refused(&place.run("eval --model model --data nothing"), 1, &["nothing"]);
    if !cfg!(feature = "cuda") {
        refused(&place.run("generate --model model -p x --device cuda"), 1, &["device cuda", "--features cuda"]);
    }
    refused(&place.run(&format!("{TRAIN} --resume")), 1, &["no checkpoint"]);
    assert!(!place.path("adapters/adapter_model.safetensors").exists());
}

#[test]
fn a_broken_adapter_names_every_fault() {
    let place = Place::new();
    good(&place.run(TRAIN));
    let path = place.path("adapters/adapter_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["lora_bias"] = true.into();
    config["novelty"] = 3.into();
    fs::write(&path, config.to_string()).unwrap();
    refused(&place.run("generate --adapter-path adapters -p x"), 1, &["lora_bias", "novelty"]);
    let tensors = place.path("adapters/adapter_model.safetensors");
    let whole = fs::read(&tensors).unwrap();
    fs::write(&tensors, &whole[..whole.len() / 2]).unwrap();
    config.as_object_mut().unwrap().retain(|key, _| key != "lora_bias" && key != "novelty");
    fs::write(&path, config.to_string()).unwrap();
    refused(&place.run("generate --adapter-path adapters -p x"), 1, &["adapter_model.safetensors"]);
}

#[test]
fn paths_need_not_be_short() {
    let place = Place::new();
    let deep = "a/b/c/adapter";
    good(&place.run(&format!("{TRAIN} --adapter-path {deep}")));
    assert!(Path::new(&place.path(deep)).join("adapter_config.json").exists());
}
