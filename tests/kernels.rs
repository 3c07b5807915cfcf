//! Runs the CUDA kernels on the CPU: compiles `kernels/*.cu` with the host compiler against the executor
//! in `kernels/simt.h`, compares them with fp64, and again under the address and undefined-behaviour sanitizers.
//!
//! The programs are in `tests/kernels/`. A program is rebuilt when a source is newer than it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::SystemTime;

const SANITIZE: &[&str] = &[
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// When the newest file of `kernels/` and `tests/kernels/` was written.
fn newest_source() -> SystemTime {
    ["kernels", "tests/kernels"]
        .iter()
        .flat_map(|dir| std::fs::read_dir(root().join(dir)).unwrap())
        .map(|entry| entry.unwrap().metadata().unwrap().modified().unwrap())
        .max()
        .unwrap()
}

fn build(name: &str, sanitized: bool) -> PathBuf {
    let suffix = if sanitized { "-sanitized" } else { "" };
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("kernels-{name}{suffix}"));
    let built = std::fs::metadata(&program).and_then(|m| m.modified());
    if built.is_ok_and(|time| time > newest_source()) {
        return program;
    }
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    // Named by the process too: two test runs may build at once, and a rename is atomic.
    let unfinished = program.with_extension(std::process::id().to_string());
    let output = Command::new(&compiler)
        .args(["-std=c++17", "-x", "c++", "-O1", "-fno-strict-aliasing"])
        .args(["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"])
        .args(if sanitized { SANITIZE } else { &[] })
        .arg("-I")
        .arg(root().join("kernels"))
        .arg("-I")
        .arg(root().join("tests/kernels"))
        .arg(root().join("tests/kernels").join(format!("{name}.cpp")))
        .arg("-o")
        .arg(&unfinished)
        .output()
        .unwrap_or_else(|error| panic!("could not run {compiler}: {error}; set CXX"));
    assert!(output.status.success(), "{name}: {}", text(&output));
    std::fs::rename(&unfinished, &program).unwrap();
    program
}

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

fn run(name: &str, sanitized: bool, args: &[&str]) -> Output {
    Command::new(build(name, sanitized))
        .args(args)
        // A thread that is abandoned after a fault keeps what it held.
        .env("ASAN_OPTIONS", "detect_leaks=0")
        .output()
        .unwrap()
}

fn passes(name: &str, sanitized: bool) {
    let output = run(name, sanitized, &[]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains(" checks, 0 failures"), "{}", text(&output));
}

#[test]
fn every_detector_finds_its_fault() {
    passes("faults", false);
}

#[test]
fn out_of_bounds_access_is_found() {
    passes("faults", true);
    for fault in ["shared_bounds", "global_bounds"] {
        let output = run("faults", true, &[fault]);
        assert!(!output.status.success(), "{fault} was not found");
        assert!(
            text(&output).contains("AddressSanitizer: heap-buffer-overflow"),
            "{fault}: {}",
            text(&output)
        );
    }
}

#[test]
fn lora_forward_kernels() {
    passes("lora_forward", false);
}

#[test]
fn lora_backward_kernels() {
    passes("lora_backward", false);
}

#[test]
fn sideband_kernels() {
    passes("sideband", false);
}

#[test]
fn lora_forward_kernels_sanitized() {
    passes("lora_forward", true);
}

#[test]
fn lora_backward_kernels_sanitized() {
    passes("lora_backward", true);
}

#[test]
fn sideband_kernels_sanitized() {
    passes("sideband", true);
}

/// CPU and CUDA drop the same elements, bit by bit.
#[test]
fn masks_are_those_of_the_cpu() {
    use tsugi_kpool::philox::{Dropout, threshold};
    const ADAPTERS: usize = 3;
    const ROWS: usize = 17;
    const COLUMNS: usize = 203;
    for (p, rng) in [
        (0.1, [42, 7]),
        (0.5, [-1, -1]),
        (0.9, [1 << 40, 5 << 32 | 9]),
    ] {
        let numbers = [
            rng[0],
            rng[1],
            i64::from(threshold(p)),
            ADAPTERS as i64,
            ROWS as i64,
            COLUMNS as i64,
        ];
        let args = numbers.map(|n| n.to_string());
        let output = run("mask", false, &args.each_ref().map(String::as_str));
        assert!(output.status.success(), "{}", text(&output));
        let got = String::from_utf8(output.stdout).unwrap();
        let mut want = String::new();
        for adapter in 0..ADAPTERS {
            let dropout = Dropout::new(p, rng, adapter).unwrap();
            for row in 0..ROWS {
                dropout.for_row(row, 0, COLUMNS, |_, factor| {
                    want.push(if factor == 0.0 { '0' } else { '1' });
                });
                want.push('\n');
            }
        }
        assert_eq!(got, want, "p = {p}, rng = {rng:?}");
    }
}
