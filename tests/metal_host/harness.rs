//! Compiles a text of kernels for the CPU with `host.cpp`, and runs the launches of a plan there.
#![allow(dead_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use candle_core::DType;
use metal_candle::backend::metal::plan::{Binding, Launch, Plan, Slot, Source};

/// The positions that every kernel takes after its memory.
pub const PLACES: [&str; 5] = [
    "threadgroup_position_in_grid",
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
];

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/metal_host");

/// A text of kernels, compiled. The folder goes when this does.
pub struct Host {
    folder: tempfile::TempDir,
}

impl Host {
    /// Compiles `text`; the error is the compiler's.
    pub fn compile(text: &str) -> Result<Self, String> {
        let folder = tempfile::tempdir().unwrap();
        let mut command = compiler(folder.path(), text);
        let shipped = Source::ALL.iter().any(|source| source.text() == text);
        command.arg(if shipped { "-O1" } else { "-O0" }).arg("-o").arg(folder.path().join("host"));
        let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        Ok(Self { folder })
    }

    /// The names of all kernels.
    pub fn kernels(&self) -> BTreeSet<String> {
        let output = Command::new(self.folder.path().join("host")).arg("--list").output().unwrap();
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_string).collect()
    }

    /// Runs `plan` under `orders` orders of threads, which must agree bit for bit. `tensors` holds what launches read, and
    /// what they add to; every other written tensor starts as NaN, of the given size. Returns what was written.
    pub fn run(&self, plan: &Plan, tensors: &Tensors, orders: u32) -> Result<BTreeMap<Slot, Vec<u8>>, String> {
        let request = Request::new(plan, tensors, orders);
        let mut child = Command::new(self.folder.path().join("host"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        let bytes = request.bytes.clone();
        // The host may refuse before it has read everything.
        let writer = std::thread::spawn(move || input.write_all(&bytes));
        let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
        let _ = writer.join();
        if !status.success() {
            return Err(format!("{status}: {}", String::from_utf8_lossy(&stderr).trim()));
        }
        Ok(request.take_apart(&stdout))
    }
}

/// The tensors of a call, as bytes.
#[derive(Default, Clone)]
pub struct Tensors {
    /// With values at the start.
    pub given: BTreeMap<Slot, Vec<u8>>,
    /// Without: sizes in bytes.
    pub made: BTreeMap<Slot, usize>,
}

/// What `host.cpp` reads: the number of orders; the buffers (name; 1 and the size of an output, or 0, 0 and the bytes); the
/// launches (kernel, grid, threads, threadgroup bytes, bindings as buffer and 1 where it is written). Numbers are u32,
/// strings and bytes follow their length.
pub struct Request {
    pub bytes: Vec<u8>,
    slots: Vec<(Option<Slot>, usize)>,
}

impl Request {
    pub fn new(plan: &Plan, tensors: &Tensors, orders: u32) -> Self {
        let bindings: Vec<Binding> = plan.launches.iter().flat_map(|launch| launch.bindings.clone()).collect();
        let bound = |slot: Slot| bindings.contains(&Binding::Read(slot)) || bindings.contains(&Binding::Write(slot));
        let mut given = tensors.given.clone();
        given.retain(|slot, _| bound(*slot) || bindings.is_empty());
        let bytes = |table: &[u32]| table.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<_>>();
        given.extend(plan.tables.iter().map(|(slot, table)| (*slot, bytes(table))));
        let mut made = tensors.made.clone();
        made.extend(plan.scratch.iter().map(|&(slot, elements)| (slot, elements * 4)));
        let mut request = Self { bytes: Vec::new(), slots: Vec::new() };
        request.number(orders as usize);
        request.number(given.len() + made.len() + plan.launches.len());
        for (slot, content) in given {
            request.buffer(&format!("{slot:?}"), Some(slot), &content);
        }
        for (slot, size) in made {
            request.text(&format!("{slot:?}"));
            request.number(1);
            request.number(size);
            request.slots.push((Some(slot), size));
        }
        for Launch { params, .. } in &plan.launches {
            request.buffer("the parameters", None, params);
        }
        request.number(plan.launches.len());
        let parameters = request.slots.len() - plan.launches.len();
        for (index, launch) in plan.launches.iter().enumerate() {
            request.text(&launch.kernel);
            launch.grid.iter().for_each(|&count| request.number(count));
            request.number(launch.threads);
            request.number(launch.threadgroup_bytes);
            request.number(launch.bindings.len());
            for binding in &launch.bindings {
                let (buffer, writes) = match binding {
                    Binding::Read(slot) => (request.index(*slot), 0),
                    Binding::Write(slot) => (request.index(*slot), 1),
                    Binding::Params => (parameters + index, 0),
                };
                request.number(buffer);
                request.number(writes);
            }
        }
        request
    }

    fn index(&self, slot: Slot) -> usize {
        self.slots
            .iter()
            .position(|(found, _)| *found == Some(slot))
            .unwrap_or_else(|| panic!("no tensor for {slot:?}"))
    }

    fn number(&mut self, value: usize) {
        self.bytes.extend(u32::try_from(value).unwrap().to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.number(text.len());
        self.bytes.extend(text.as_bytes());
    }

    fn buffer(&mut self, name: &str, slot: Option<Slot>, content: &[u8]) {
        self.text(name);
        self.number(0);
        self.number(0);
        self.number(content.len());
        self.bytes.extend(content);
        self.slots.push((slot, content.len()));
    }

    fn take_apart(&self, mut output: &[u8]) -> BTreeMap<Slot, Vec<u8>> {
        let mut tensors = BTreeMap::new();
        for &(slot, size) in &self.slots {
            let (content, rest) = output.split_at(size);
            output = rest;
            if let Some(slot) = slot {
                tensors.insert(slot, content.to_vec());
            }
        }
        assert!(output.is_empty(), "the host wrote more than the buffers");
        tensors
    }
}

/// The C++ compiler with all but its output set. `text` loses its `[[attributes]]`, which no CPU knows; [`signatures`] has read
/// them.
fn compiler(folder: &Path, text: &str) -> Command {
    let kernels = folder.join("kernels.metal");
    std::fs::write(&kernels, without_attributes(text)).unwrap();
    let mut build = cc::Build::new();
    build.cpp(true).opt_level(0).out_dir(folder).cargo_metadata(false).cargo_warnings(false).warnings(false);
    build.host(HOST).target(HOST).debug(false).std("c++14");
    let mut command = build.get_compiler().to_command();
    host_arguments(&mut command, &kernels);
    command
}

fn host_arguments(command: &mut Command, kernels: &Path) {
    command.args(["-Wall", "-Werror", "-Wno-unknown-pragmas"]);
    if cfg!(target_vendor = "apple") {
        // ucontext.h is there, but deprecated and behind a switch.
        command.args(["-D_XOPEN_SOURCE=600", "-D_DARWIN_C_SOURCE", "-Wno-deprecated-declarations"]);
    }
    command.arg(format!("-DKERNELS=\"{}\"", kernels.display()));
    command.arg(format!("-I{FOLDER}/msl")).arg(format!("{FOLDER}/host.cpp"));
}

/// What `cc` calls this machine. The exact name matters to cross-compilers only.
const HOST: &str = match (cfg!(target_vendor = "apple"), cfg!(target_arch = "aarch64")) {
    (true, true) => "aarch64-apple-darwin",
    (true, false) => "x86_64-apple-darwin",
    (false, true) => "aarch64-unknown-linux-gnu",
    (false, false) => "x86_64-unknown-linux-gnu",
};

/// Clang's word on the address spaces of `text`; `None` where there is no Clang.
pub fn check_address_spaces(text: &str) -> Option<Result<(), String>> {
    let folder = tempfile::tempdir().unwrap();
    let kernels = folder.path().join("kernels.metal");
    std::fs::write(&kernels, without_attributes(text)).unwrap();
    let mut command = Command::new("clang++");
    command.args(["-std=c++14", "-fsyntax-only", "-DCHECK_ADDRESS_SPACES"]);
    host_arguments(&mut command, &kernels);
    let output = command.output().ok()?;
    Some(if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) })
}

/// The pointers and references that `text` declares without an address space.
pub fn without_address_space(text: &str) -> Vec<&str> {
    const SPACES: [&str; 4] = ["device", "threadgroup", "constant", "thread"];
    let code = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    let mut found = Vec::new();
    for declaration in code.flat_map(|line| line.split(['(', ',', ';', '{', ')', '='])).map(str::trim) {
        // `T* name`; a product has a space on both sides.
        let declares = declaration.split_once(['*', '&']).is_some_and(|(before, after)| {
            before.ends_with(|end: char| end.is_alphanumeric()) && after.starts_with(' ')
        });
        if declares && !declaration.split(' ').any(|word| SPACES.contains(&word)) {
            found.push(declaration);
        }
    }
    found
}

fn without_attributes(text: &str) -> String {
    let mut parts = text.split("[[");
    let first = parts.next().unwrap_or_default().to_string();
    parts.fold(first, |text, part| text + part.split_once("]]").expect("an attribute that ends").1)
}

/// Fails to compile unless the struct `name` of `text` has this size and these offsets.
pub fn check_layout(text: &str, name: &str, size: usize, fields: &[(&str, usize)]) -> Result<(), String> {
    let mut text = text.to_string();
    text += &format!("static_assert(sizeof({name}) == {size}, \"size\");\n");
    for (field, offset) in fields {
        text += &format!("static_assert(offsetof({name}, {field}) == {offset}, \"{field}\");\n");
    }
    let folder = tempfile::tempdir().unwrap();
    let output = compiler(folder.path(), &text).arg("-fsyntax-only").output().unwrap();
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// The kernels of `text`: name and, for each argument, its attribute.
pub fn signatures(text: &str) -> BTreeMap<String, Vec<String>> {
    let mut all = BTreeMap::new();
    for part in text.split("kernel void ").skip(1) {
        let (name, rest) = part.split_once('(').unwrap();
        let (arguments, _) = rest.split_once(") {").unwrap();
        let attributes = arguments.split("[[").skip(1).map(|part| part.split_once("]]").unwrap().0.trim().to_string());
        let attributes: Vec<String> = attributes.collect();
        assert_eq!(attributes.len(), arguments.split(',').count(), "{name}: every argument has one attribute");
        all.insert(name.to_string(), attributes);
    }
    all
}

/// Where `METAL_HOST_CASES` names a folder, saves a case for `cuda/check.cu`: what it is, the request, and for each buffer its
/// type (0: not compared), the tolerance and what it must hold. Large cases are left out.
pub fn save_case(
    what: &str,
    plan: &Plan,
    tensors: &Tensors,
    results: &BTreeMap<Slot, Vec<u8>>,
    written: &[(Slot, DType, f64)],
) {
    let Some(folder) = std::env::var_os("METAL_HOST_CASES") else { return };
    let request = Request::new(plan, tensors, 1);
    if request.bytes.len() > 1_200_000 {
        return;
    }
    let mut case = (what.len() as u32).to_le_bytes().to_vec();
    case.extend(what.as_bytes());
    case.extend(&request.bytes);
    for (slot, _) in &request.slots {
        let compared = written.iter().find(|(found, ..)| Some(*found) == *slot);
        let Some((slot, dtype, limit)) = compared else {
            case.extend(0_u32.to_le_bytes());
            continue;
        };
        let number = match dtype {
            DType::F16 => 2_u32,
            DType::BF16 => 3,
            _ => 1,
        };
        case.extend(number.to_le_bytes());
        case.extend((*limit as f32).to_le_bytes());
        case.extend((results[slot].len() as u32).to_le_bytes());
        case.extend(&results[slot]);
    }
    let name: String = what.chars().filter(|character| character.is_ascii_alphanumeric()).collect();
    std::fs::write(Path::new(&folder).join(name), case).unwrap();
}

/// `text` with `from`, which it has exactly once, replaced.
pub fn change(text: &str, from: &str, to: &str) -> String {
    assert_eq!(text.matches(from).count(), 1, "{from}");
    text.replace(from, to)
}
