//! A model of the hub opens by its name. A server on this machine plays the hub, redirects included.
#![allow(missing_docs)]

mod common;

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor};
use metal_candle::models::{Hub, ModelFiles};
use serde_json::json;
use tempfile::TempDir;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub with one model, `tiny/llama`, from a folder. `tiny/gated` is the same for those who hold the token "let me in".
struct Server {
    endpoint: String,
    /// `GET path` of each request in turn.
    seen: Arc<Mutex<Vec<String>>>,
    /// Weights break off half-way.
    cut: Arc<AtomicBool>,
    folder: TempDir,
    cache: TempDir,
}

impl Server {
    fn start(sharded: bool) -> Self {
        let (folder, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        common::tiny::write_model(folder.path(), 3);
        // What a model's folder has besides: it must not be downloaded.
        fs::write(folder.path().join("README.md"), "read me").unwrap();
        fs::write(folder.path().join("pytorch_model.bin"), "pickle").unwrap();
        if sharded {
            shard(folder.path());
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let cut = Arc::new(AtomicBool::new(false));
        let (files, address, log, cuts) = (folder.path().to_path_buf(), endpoint.clone(), seen.clone(), cut.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (files, address, log, cut) = (files.clone(), address.clone(), log.clone(), cuts.clone());
                std::thread::spawn(move || serve(stream, &files, &address, &log, &cut));
            }
        });
        Self { endpoint, seen, cut, folder, cache }
    }

    fn hub(&self) -> Hub {
        Hub { endpoint: self.endpoint.clone(), token: None, cache: self.cache.path().join("hub"), offline: false }
    }

    fn requests(&self, part: &str) -> usize {
        self.seen.lock().unwrap().iter().filter(|request| request.contains(part)).count()
    }
}

/// Splits the weights over two files with an index.
fn shard(folder: &Path) {
    let single = folder.join("model.safetensors");
    let mut tensors: Vec<(String, Tensor)> =
        candle_core::safetensors::load(&single, &Device::Cpu).unwrap().into_iter().collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let mut map = serde_json::Map::new();
    for (part, tensors) in tensors.chunks(tensors.len().div_ceil(2)).enumerate() {
        let name = format!("model-{:05}-of-00002.safetensors", part + 1);
        map.extend(tensors.iter().map(|(tensor, _)| (tensor.clone(), json!(name))));
        let tensors: HashMap<String, Tensor> = tensors.iter().cloned().collect();
        candle_core::safetensors::save(&tensors, folder.join(name)).unwrap();
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    fs::remove_file(single).unwrap();
}

fn serve(stream: TcpStream, folder: &Path, endpoint: &str, log: &Mutex<Vec<String>>, cut: &AtomicBool) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut out = stream;
    loop {
        let mut first = String::new();
        if reader.read_line(&mut first).unwrap_or(0) == 0 {
            return;
        }
        let mut headers = HashMap::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            let Some((name, value)) = line.trim().split_once(": ") else { break };
            headers.insert(name.to_ascii_lowercase(), value.to_string());
        }
        let path = first.split(' ').nth(1).unwrap().to_string();
        log.lock().unwrap().push(path.clone());
        let (status, extra, body) = answer(&path, &headers, folder, endpoint);
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n{extra}\r\n", body.len());
        let cut = cut.load(Ordering::SeqCst) && path.starts_with("/cdn/") && body.len() > 1;
        let sent = if cut { &body[..body.len() / 2] } else { &body[..] };
        if out.write_all(head.as_bytes()).and_then(|()| out.write_all(sent)).is_err() || cut {
            return;
        }
    }
}

fn answer(
    path: &str,
    headers: &HashMap<String, String>,
    folder: &Path,
    endpoint: &str,
) -> (&'static str, String, Vec<u8>) {
    let missing = ("404 Not Found", String::new(), b"not found".to_vec());
    if path.contains("tiny/gated") && headers.get("authorization").map(String::as_str) != Some("Bearer let me in") {
        return ("401 Unauthorized", String::new(), b"gated".to_vec());
    }
    if let Some(rest) = path.strip_prefix("/api/models/") {
        let known = ["tiny/llama/revision/main", "tiny/gated/revision/main", "tiny/llama/revision/refs%2Fpr%2F1"];
        if rest == "tiny/gguf/revision/main" {
            let info = json!({"sha": COMMIT, "siblings": [{"rfilename": "x-Q4_K_M.gguf"}]});
            return ("200 OK", String::new(), info.to_string().into_bytes());
        }
        if !known.contains(&rest) {
            return missing;
        }
        let files = fs::read_dir(folder).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
        let siblings: Vec<_> = files.map(|name| json!({"rfilename": name})).collect();
        return ("200 OK", String::new(), json!({"sha": COMMIT, "siblings": siblings}).to_string().into_bytes());
    }
    let file = path.rsplit('/').next().unwrap();
    let Ok(bytes) = fs::read(folder.join(file)) else { return missing };
    let etag = format!("{:x}", bytes.iter().fold(7u64, |hash, &byte| hash.wrapping_mul(31).wrapping_add(byte as u64)));
    if path.contains("/resolve/") {
        assert!(path.contains(COMMIT), "a file of another commit was asked for: {path}");
        let facts = format!("X-Repo-Commit: {COMMIT}\r\nX-Linked-Etag: \"{etag}\"\r\n");
        // Large files come from another host, small ones from another path of this one.
        return if file.ends_with(".safetensors") {
            ("302 Found", format!("{facts}Location: {endpoint}/cdn/{file}\r\n"), Vec::new())
        } else {
            ("307 Temporary Redirect", format!("{facts}Location: /resolve-cache/{COMMIT}/{file}\r\n"), Vec::new())
        };
    }
    let (start, end) = headers.get("range").and_then(|range| range.strip_prefix("bytes=")?.split_once('-')).unwrap();
    let start: usize = start.parse().unwrap();
    let end = end.parse().map_or(bytes.len(), |end: usize| (end + 1).min(bytes.len()));
    let facts = format!(
        "X-Repo-Commit: {COMMIT}\r\nETag: \"{etag}\"\r\nContent-Range: bytes {start}-{}/{}\r\n",
        end - 1,
        bytes.len()
    );
    ("206 Partial Content", facts, bytes[start..end].to_vec())
}

fn problem(result: metal_candle::Result<ModelFiles>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn a_model_opens_by_name_and_only_its_own_files_are_fetched() {
    for sharded in [false, true] {
        let server = Server::start(sharded);
        let model = ModelFiles::from_hub("tiny/llama", &server.hub()).unwrap();
        assert_eq!(model.name, "tiny/llama");
        let local = ModelFiles::open(server.folder.path().to_str().unwrap()).unwrap();
        let (got, want) =
            (model.weights(DType::F32, &Device::Cpu).unwrap(), local.weights(DType::F32, &Device::Cpu).unwrap());
        assert_eq!(got.len(), want.len());
        for (name, want) in &want {
            assert_eq!(common::f64s(&got[name]), common::f64s(want), "{name}");
        }
        assert_eq!(server.requests("README"), 0);
        assert_eq!(server.requests("pytorch"), 0);
        assert_eq!(server.requests("resolve/main"), 0, "files are asked for by commit, so that all are of one");

        // A second time nothing is downloaded; offline nobody is asked.
        let before = server.requests("");
        ModelFiles::from_hub("tiny/llama", &server.hub()).unwrap();
        assert_eq!(server.requests(""), before + 1, "the revision is looked up, the files are there");
        ModelFiles::from_hub("tiny/llama", &Hub { offline: true, ..server.hub() }).unwrap();
        ModelFiles::from_hub(&format!("tiny/llama@{COMMIT}"), &server.hub()).unwrap();
        assert_eq!(server.requests(""), before + 1);
        ModelFiles::from_hub("tiny/llama@refs/pr/1", &server.hub()).unwrap();
        // Where the hub cannot be reached, the cache serves.
        ModelFiles::from_hub("tiny/llama", &Hub { endpoint: dead(), ..server.hub() }).unwrap();
    }
}

/// An address where nobody listens.
fn dead() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[test]
fn what_fails_says_why_and_what_to_do() {
    let server = Server::start(false);
    let hub = server.hub();
    let error = problem(ModelFiles::from_hub("tiny/other", &hub));
    assert!(
        error.contains("tiny/other") && error.contains("no such model") && error.contains(&hub.endpoint),
        "{error}"
    );
    let error = problem(ModelFiles::from_hub("tiny/llama@v9", &hub));
    assert!(error.contains("revision 'v9'"), "{error}");
    let error = problem(ModelFiles::from_hub("tiny/gguf", &hub));
    assert!(
        error.contains("config.json, tokenizer.json, model.safetensors") && error.contains("x-Q4_K_M.gguf"),
        "{error}"
    );
    let error = problem(ModelFiles::from_hub("tiny/llama", &Hub { endpoint: dead(), ..hub.clone() }));
    assert!(error.contains("cannot be reached") && error.contains("HF_ENDPOINT"), "{error}");
    let error = problem(ModelFiles::from_hub("tiny/llama", &Hub { offline: true, ..hub.clone() }));
    assert!(error.contains("HF_HUB_OFFLINE"), "{error}");
    let error = problem(ModelFiles::from_hub("../tiny", &hub));
    assert!(error.contains("owner/name"), "{error}");
    let error = problem(ModelFiles::open("no-such-folder"));
    assert!(error.contains("is not there"), "{error}");
}

#[test]
fn a_gated_model_asks_for_a_token_and_takes_it() {
    let server = Server::start(false);
    let error = problem(ModelFiles::from_hub("tiny/gated", &server.hub()));
    assert!(error.contains("gated") && error.contains("/settings/tokens") && error.contains("HF_TOKEN"), "{error}");
    let with = |token: &str| Hub { token: Some(token.to_string()), ..server.hub() };
    let error = problem(ModelFiles::from_hub("tiny/gated", &with("wrong")));
    assert!(error.contains("owner of your token") && !error.contains("wrong"), "{error}");
    ModelFiles::from_hub("tiny/gated", &with("let me in")).unwrap();
    assert!(!format!("{:?}", with("let me in")).contains("let me in"), "the token is printed");
}

/// A download that breaks off is continued by the next one, and never taken for whole.
#[test]
fn a_broken_download_is_not_a_model() {
    let server = Server::start(false);
    let offline = Hub { offline: true, ..server.hub() };
    server.cut.store(true, Ordering::SeqCst);
    for _ in 0..3 {
        let error = problem(ModelFiles::from_hub("tiny/llama", &server.hub()));
        assert!(error.contains("model.safetensors"), "{error}");
        assert!(ModelFiles::from_hub("tiny/llama", &offline).is_err());
    }
    server.cut.store(false, Ordering::SeqCst);
    ModelFiles::from_hub("tiny/llama", &server.hub()).unwrap();
    ModelFiles::from_hub("tiny/llama", &offline).unwrap();
    let snapshot = server.cache.path().join("hub/models--tiny--llama/snapshots").join(COMMIT);
    let read = |folder: &Path| fs::read(folder.join("model.safetensors")).unwrap();
    assert!(read(&snapshot) == read(server.folder.path()), "the continued file is another");
}
