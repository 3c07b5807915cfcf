//! Runs the CUDA kernels on the CPU: compiles `kernels/*.cu` with the host compiler against the executor
//! in `kernels/simt.h`, compares them with fp64, and again under the address and undefined-behaviour sanitizers.
//!
//! The programs are in `tests/kernels/`.

#[path = "kernels/build.rs"]
mod build;

use build::{build, text};
use std::process::{Command, Output};

const SANITIZE: &[&str] = &["-fsanitize=address,undefined", "-fno-sanitize-recover=all"];

fn run(name: &str, sanitized: bool, args: &[&str]) -> Output {
    let program = if sanitized {
        build(name, "-sanitized", SANITIZE)
    } else {
        build(name, "", &[])
    };
    Command::new(program)
        .args(args)
        // A thread that is abandoned after a fault keeps what it held.
        .env("ASAN_OPTIONS", "detect_leaks=0")
        .output()
        .unwrap()
}

fn passes(name: &str, sanitized: bool) {
    let output = run(name, sanitized, &[]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(
        text(&output).contains(" checks, 0 failures"),
        "{}",
        text(&output)
    );
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
fn buffer_kernels() {
    passes("buffer", false);
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
fn buffer_kernels_sanitized() {
    passes("buffer", true);
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
