//! The key file: 64 hexadecimal digits in a regular file that its owner alone can read.
//!
//! Anything else is refused with a sentence, and nothing waits: a FIFO or a device is opened without blocking. The checks are
//! made on the opened file, not on its name, which could point elsewhere a moment later. Symbolic links are followed, since
//! secrets are often mounted that way; the file at their end counts. No message repeats what the file holds.

use super::session::Key;
use crate::error::{Error, Result};
use std::fs::{File, FileType, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use zeroize::Zeroizing;

/// Longest key file: the digits, and blanks and line ends around them.
const MOST: usize = 256;
const DIGITS: usize = 64;
const HOW: &str = "make one with: (umask 077; openssl rand -hex 32 > FILE)";

/// Reads the key.
pub fn read(path: &Path) -> Result<Key> {
    let fail =
        |what: String| Error::argument("sideband", format!("key file {}: {what}", path.display()));
    let file = open(path).map_err(fail)?;
    // One byte more than it may hold; never a growing buffer, so that nothing is left behind unwiped.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MOST + 1));
    file.take(MOST as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| fail(e.to_string()))?;
    parse(&bytes).map_err(fail)
}

/// The file, if it is one that may hold a key.
fn open(path: &Path) -> std::result::Result<File, String> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(|e| match e.raw_os_error() {
            Some(libc::ENXIO) => "it is a socket or a device, not a regular file".to_owned(),
            _ => e.to_string(),
        })?;
    let meta = file.metadata().map_err(|e| e.to_string())?;
    if !meta.is_file() {
        let kind = kind(meta.file_type());
        return Err(format!("it is a {kind}, not a regular file"));
    }
    // SAFETY: geteuid has no arguments and cannot fail.
    let me = unsafe { libc::geteuid() };
    if meta.uid() != me && meta.uid() != 0 {
        return Err(format!(
            "it belongs to user {}, who could change it; it must belong to this process's user, {me}, or to root",
            meta.uid()
        ));
    }
    let mode = meta.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(format!(
            "its mode is {mode:04o}; make it a file that its owner alone can read (chmod 600)"
        ));
    }
    Ok(file)
}

fn kind(file: FileType) -> &'static str {
    if file.is_dir() {
        "directory"
    } else if file.is_fifo() {
        "FIFO"
    } else if file.is_char_device() || file.is_block_device() {
        "device"
    } else {
        "special file"
    }
}

fn parse(bytes: &[u8]) -> std::result::Result<Key, String> {
    if bytes.len() > MOST {
        return Err(format!(
            "it holds more than {MOST} bytes, but a key is {DIGITS} hexadecimal digits"
        ));
    }
    if bytes.starts_with(b"\xef\xbb\xbf") {
        return Err("it begins with a byte order mark (BOM): save it as plain ASCII".into());
    }
    let text = std::str::from_utf8(bytes)
        .map_err(|_| format!("it is not text, but a key is {DIGITS} hexadecimal digits; {HOW}"))?
        .trim_ascii();
    if text.is_empty() {
        return Err(format!("it is empty; {HOW}"));
    }
    let (count, lines) = (text.chars().count(), text.lines().count());
    if lines != 1 {
        return Err(format!(
            "it has {lines} lines, but a key is one line of {DIGITS} hexadecimal digits, without comments"
        ));
    }
    if let Some(at) = text.chars().position(|c| !c.is_ascii_hexdigit()) {
        return Err(format!(
            "its character {} is none of 0-9, a-f and A-F, but a key is {DIGITS} hexadecimal digits; {HOW}",
            at + 1
        ));
    }
    if count != DIGITS {
        return Err(format!(
            "it holds {count} hexadecimal digits, but a key has {DIGITS}; {HOW}"
        ));
    }
    let first = text.chars().next();
    if text.chars().all(|c| Some(c) == first) {
        return Err(format!(
            "all its digits are the same, which is no key; {HOW}"
        ));
    }
    Key::from_hex(text).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const DIGIT: &str = "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796a5b4c3d2e1f0";

    /// What reading these bytes says; the key's digits if it is one.
    fn said(bytes: impl AsRef<[u8]>) -> String {
        parse(bytes.as_ref()).map_or_else(|e| e, |key| key.to_hex())
    }

    #[test]
    fn what_is_documented_is_read_and_everything_else_is_named() {
        let spaces = " ".repeat(90);
        for read in [
            DIGIT.to_owned(),
            format!("{DIGIT}\n"),
            format!("{DIGIT}\r\n"),
            format!("  {DIGIT}\t\n\n"),
            DIGIT.to_uppercase(),
            format!("{spaces}{DIGIT}{spaces}"),
        ] {
            assert_eq!(said(&read), DIGIT, "{read:?}");
        }
        for (bytes, says) in [
            ("".into(), "it is empty"),
            ("\n".into(), "it is empty"),
            (DIGIT[1..].to_owned(), "63 hexadecimal digits"),
            (format!("{DIGIT}0"), "65 hexadecimal digits"),
            (format!("\u{feff}{DIGIT}"), "byte order mark"),
            (format!("# key\n{DIGIT}"), "2 lines"),
            (format!("{DIGIT}\n{DIGIT}"), "2 lines"),
            (format!("{DIGIT} # key"), "character 65"),
            (format!("0x{DIGIT}"), "character 2"),
            (format!("{}é", &DIGIT[1..]), "character 64"),
            ("0".repeat(64), "the same"),
            (format!("{}{DIGIT}", " ".repeat(300)), "more than 256 bytes"),
        ] {
            let said = said(&bytes);
            assert!(said.contains(says), "{bytes:?}: {said}");
            assert!(!said.contains(&DIGIT[8..32]), "it repeats the key: {said}");
        }
        assert!(said([0xff; 64]).contains("not text"));
        assert!(said([b'0'; 1000]).contains("more than 256 bytes"));
    }

    #[test]
    fn only_a_regular_file_that_its_owner_alone_can_read_is_opened() {
        let folder = std::env::temp_dir().join(format!("tsugi-key-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("key");
        std::fs::write(&path, DIGIT).unwrap();
        for mode in [
            0o644, 0o640, 0o604, 0o660, 0o601, 0o610, 0o400, 0o600, 0o700,
        ] {
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
            let read = read(&path);
            match mode & 0o077 {
                0 => assert!(read.is_ok(), "{mode:o}"),
                _ => {
                    let said = read.err().unwrap().to_string();
                    let expected = [&format!("{mode:04o}"), "chmod 600", "key"];
                    assert!(expected.iter().all(|e| said.contains(*e)), "{said}");
                }
            }
        }
        let link = folder.join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(read(&link).is_ok());
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        assert!(read(&link).is_err(), "the file at the link's end counts");
        let loose = folder.join("nothing");
        std::os::unix::fs::symlink(folder.join("nowhere"), &loose).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(folder.join("socket")).unwrap();
        for (path, says) in [
            (folder.clone(), "directory"),
            ("/dev/null".into(), "device"),
            (folder.join("socket"), "socket"),
            (loose, "No such file"),
            (folder.join("nowhere"), "No such file"),
        ] {
            let said = read(&path).err().unwrap().to_string();
            assert!(said.contains(says), "{path:?}: {said}");
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
