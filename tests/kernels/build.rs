//! Compiles the programs of `tests/kernels/` with the host compiler, when a source is newer than what is there.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::SystemTime;

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

/// A program, or with `extra` flags something else under the name `suffix` tells apart.
pub fn build(name: &str, suffix: &str, extra: &[&str]) -> PathBuf {
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
        .args(extra)
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

pub fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}
