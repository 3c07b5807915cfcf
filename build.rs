//! Builds the C++ side of the bridge against torch's headers, where the `extension` feature asks for it.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_EXTENSION").is_some() {
        bridge();
    }
}

/// Compiles the cxx bridge and cpp/, and links libtorch_cpu by name: Python imports torch first, so the
/// library is found by its SONAME and no path is built in.
fn bridge() {
    let torch = torch_dir();
    cxx_build::bridge("src/bridge.rs")
        .file("cpp/ops.cpp")
        .std("c++20")
        .include(torch.join("include"))
        .include(torch.join("include/torch/csrc/api/include"))
        // The oldest torch whose ABI the binary uses.
        .define("TORCH_TARGET_VERSION", "0x020b000000000000")
        .flag_if_supported("-Wno-unused-parameter")
        .flag_if_supported("-fvisibility=hidden")
        .compile("tsugi_bridge");
    println!("cargo:rerun-if-changed=cpp/ops.cpp");
    println!("cargo:rerun-if-changed=cpp/ops.h");
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
