//! Reads the kernels' block sizes; builds the kernels where the `cuda` feature asks for it, and the C++ side of the
//! bridge against torch's headers where the `extension` feature does.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    let sources = kernel_sources();
    block_sizes(&sources);
    if std::env::var_os("CARGO_FEATURE_CUDA").is_some() {
        kernels(&sources);
    }
    if std::env::var_os("CARGO_FEATURE_EXTENSION").is_some() {
        bridge();
    }
}

/// Everything in `kernels/` that nvcc reads, in one order.
fn kernel_sources() -> Vec<PathBuf> {
    let mut sources: Vec<PathBuf> = std::fs::read_dir("kernels")
        .expect("kernels/ is part of the package")
        .map(|entry| entry.expect("kernels/ can be read").path())
        .filter(|path| {
            path.extension()
                .is_some_and(|ext| ext == "cu" || ext == "cuh")
        })
        .collect();
    sources.sort();
    sources
}

fn out_dir() -> PathBuf {
    PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"))
}

/// Writes tile.rs: every `constexpr int NAME = value;` of the kernels, so that a block size stands beside its kernel alone.
fn block_sizes(sources: &[PathBuf]) {
    let mut out = String::new();
    for source in sources {
        let text = std::fs::read_to_string(source).expect("a kernel is text");
        for line in text.lines() {
            let Some((name, value)) = line
                .strip_prefix("constexpr int ")
                .and_then(|rest| rest.strip_suffix(';'))
                .and_then(|rest| rest.split_once(" = "))
            else {
                continue;
            };
            let file = source.file_name().unwrap_or_default().to_string_lossy();
            let _ = writeln!(out, "/// `{file}`.\npub const {name}: usize = {value};");
        }
    }
    std::fs::write(out_dir().join("tile.rs"), out).expect("OUT_DIR is writable");
}

/// Machine code that is built in, and PTX for what comes later. `a`: with that chip's own instructions.
const ARCHITECTURES: &[&str] = &["80", "90a"];
const PTX: &str = "90";

/// Compiles every kernel into one fatbin, and writes what each needs of a multiprocessor to resources.rs.
fn kernels(sources: &[PathBuf]) {
    let (out, nvcc) = (out_dir(), nvcc());
    let known = output(Command::new(&nvcc).arg("--list-gpu-code"));
    let architectures: Vec<&&str> = ARCHITECTURES
        .iter()
        .filter(|arch| {
            known
                .split_whitespace()
                .any(|code| code == format!("sm_{}", arch.trim_end_matches('a')))
        })
        .collect();
    let directory = std::env::current_dir().expect("a current directory");
    let all: String = sources
        .iter()
        .filter(|path| path.extension().is_some_and(|ext| ext == "cu"))
        .map(|path| format!("#include \"{}\"\n", directory.join(path).display()))
        .collect();
    std::fs::write(out.join("kernels.cu"), all).expect("OUT_DIR is writable");
    let mut command = Command::new(&nvcc);
    command
        .args(["-std=c++17", "-O3", "-fatbin", "--threads", "0"])
        .args(["-Xptxas", "-v"])
        .arg("-I")
        .arg(directory.join("kernels"));
    for arch in &architectures {
        command.args(["-gencode", &format!("arch=compute_{arch},code=sm_{arch}")]);
    }
    command.args([
        "-gencode",
        &format!("arch=compute_{PTX},code=compute_{PTX}"),
    ]);
    command
        .arg(out.join("kernels.cu"))
        .arg("-o")
        .arg(out.join("kernels.fatbin"));
    let log = output(&mut command);
    let mut table = String::from(
        "/// (kernel, architecture, registers, bytes spilled, bytes of static shared memory)\n\
         pub const RESOURCES: &[(&str, &str, u32, u32, u32)] = &[\n",
    );
    let (mut kernel, mut arch, mut spilled) = ("", "", 0);
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let mut quoted = rest.split('\'');
            kernel = quoted.next().unwrap_or_default();
            arch = quoted.nth(1).unwrap_or_default();
        } else if line.contains("bytes spill stores") {
            spilled = number_before(line, " bytes spill stores")
                + number_before(line, " bytes spill loads");
        } else if line.contains(" registers") {
            let registers = number_before(line, " registers");
            let shared = number_before(line, " bytes smem");
            let _ = writeln!(
                table,
                "    (\"{kernel}\", \"{arch}\", {registers}, {spilled}, {shared}),"
            );
            // Seen with `cargo build -vv`.
            println!(
                "{kernel} {arch}: {registers} registers, {shared} B static shared, {spilled} B spilled"
            );
        }
    }
    let names: Vec<String> = architectures.iter().map(|a| format!("sm_{a}")).collect();
    let _ = writeln!(
        table,
        "];\n/// What the fatbin holds, in words.\npub const ARCHITECTURES: &str = \"{}, and PTX for compute_{PTX}\";",
        names.join(", ")
    );
    std::fs::write(out.join("resources.rs"), table).expect("OUT_DIR is writable");
}

/// The number that stands before `word`; 0 where the line does not say.
fn number_before(line: &str, word: &str) -> u32 {
    line.split_once(word)
        .and_then(|(head, _)| head.rsplit([' ', ',']).next())
        .and_then(|digits| digits.parse().ok())
        .unwrap_or(0)
}

/// nvcc: `NVCC`, the one beside torch in site-packages (nvidia-cuda-nvcc), `CUDA_HOME`, or that on PATH.
fn nvcc() -> PathBuf {
    println!("cargo:rerun-if-env-changed=NVCC");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    println!("cargo:rerun-if-env-changed=PYO3_PYTHON");
    if let Some(nvcc) = std::env::var_os("NVCC") {
        return nvcc.into();
    }
    let python = std::env::var("PYO3_PYTHON").unwrap_or_else(|_| "python3".into());
    let code = "import importlib.util as u, glob; s = u.find_spec('nvidia'); print(next((f for d in (s.submodule_search_locations if s else []) for f in sorted(glob.glob(d + '/cu*/bin/nvcc'))), ''))";
    let beside_torch = Command::new(python)
        .args(["-c", code])
        .output()
        .map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned());
    if let Ok(path) = beside_torch
        && !path.is_empty()
    {
        return path.into();
    }
    match std::env::var_os("CUDA_HOME") {
        Some(home) => Path::new(&home).join("bin/nvcc"),
        None => "nvcc".into(),
    }
}

/// What a command prints to both streams; a failure ends the build with it.
fn output(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| {
        panic!(
            "could not run {:?}: {error}; install nvidia-cuda-nvcc, or set NVCC or CUDA_HOME",
            command.get_program()
        )
    });
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{command:?} failed:\n{text}");
    text
}

/// Compiles the two cxx bridges and cpp/, and links libtorch_cpu by name: Python imports torch first, so the
/// library is found by its SONAME and no path is built in.
fn bridge() {
    let torch = torch_dir();
    let mut build = cxx_build::bridges(["src/torch.rs", "src/bridge.rs"]);
    if std::env::var_os("CARGO_FEATURE_CUDA").is_some() {
        build.define("TSUGI_CUDA", None);
    }
    build
        .files(["cpp/torch.cpp", "cpp/ops.cpp"])
        .std("c++20")
        .include(torch.join("include"))
        .include(torch.join("include/torch/csrc/api/include"))
        // The oldest torch whose ABI the binary uses.
        .define("TORCH_TARGET_VERSION", "0x020b000000000000")
        .flag_if_supported("-Wno-unused-parameter")
        .flag_if_supported("-fvisibility=hidden")
        // Error texts name torch's headers as torch does, not by a folder of the machine that built this.
        .flag_if_supported(format!(
            "-ffile-prefix-map={}/=",
            torch.join("include").display()
        ))
        // Nothing refers to ops.cpp: its tables register themselves when the library is loaded.
        .link_lib_modifier("+whole-archive")
        .compile("tsugi_bridge");
    println!("cargo:rerun-if-changed=cpp");
    println!(
        "cargo:rustc-link-search=native={}",
        torch.join("lib").display()
    );
    println!("cargo:rustc-link-lib=dylib=torch_cpu");
}

/// The installed torch package: `TORCH_DIR`, or that of the Python in `PYO3_PYTHON` (else `python3`).
fn torch_dir() -> PathBuf {
    println!("cargo:rerun-if-env-changed=TORCH_DIR");
    println!("cargo:rerun-if-env-changed=PYO3_PYTHON");
    if let Some(dir) = std::env::var_os("TORCH_DIR") {
        return checked(PathBuf::from(dir), "TORCH_DIR");
    }
    let python = std::env::var("PYO3_PYTHON").unwrap_or_else(|_| "python3".into());
    // Finding the package does not import it: an import of torch takes seconds.
    let code = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')";
    let output = Command::new(&python)
        .args(["-c", code])
        .output()
        .unwrap_or_else(|error| {
            panic!("could not run {python} to find torch: {error}; set PYO3_PYTHON or TORCH_DIR")
        });
    checked(
        PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()),
        &python,
    )
}

fn checked(dir: PathBuf, from: &str) -> PathBuf {
    let header = Path::new("include/torch/csrc/stable/tensor.h");
    if !dir.join(header).is_file() {
        panic!(
            "torch >= 2.11 was not found through {from} ({} has no {}); install torch there, or set PYO3_PYTHON or TORCH_DIR",
            dir.display(),
            header.display()
        );
    }
    dir
}
