//! The handshake (Noise `NNpsk0_25519_ChaChaPoly_BLAKE2s`), which proves that both sides hold the key, and sealed records.
//!
//! The acceptor believes a dialler only after its first sealed frame. A recorded first message can be played again, but the
//! one who plays it cannot read the answer.

use super::frame::{MAX_RECORD, Malformed, OPENING, Opening};
use crate::error::{Error, Result};
use zeroize::Zeroize;

/// The Noise handshake.
pub const PATTERN: &str = "Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s";
/// Bytes that prove that a sealed text was not changed.
pub const TAG: usize = 16;
/// Bytes of an ephemeral key.
pub const EPHEMERAL: usize = 32;
/// Opening, ephemeral key, tag: the only length that a first record may have.
pub const FIRST: usize = OPENING + EPHEMERAL + TAG;
/// Ephemeral key, sealed node and boot: the only length of an answer.
pub const ANSWER: usize = EPHEMERAL + 10 + TAG;
/// Longest plain text of a record.
pub const MAX_PLAIN: usize = MAX_RECORD - TAG;

/// The job's pre-shared key. It is never printed, and wiped from memory when it is dropped.
#[derive(Clone)]
pub struct Key([u8; 32]);

impl Drop for Key {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl Key {
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// A key of 64 hexadecimal digits.
    pub fn from_hex(text: &str) -> Result<Self> {
        let text = text.trim();
        let wrong = || Error::argument("sideband", "the key must be 64 hexadecimal digits");
        if text.len() != 64 || !text.is_ascii() {
            return Err(wrong());
        }
        let mut key = Self([0; 32]);
        for (byte, digits) in key.0.iter_mut().zip(text.as_bytes().chunks(2)) {
            let digit = |c: u8| (c as char).to_digit(16).ok_or_else(wrong);
            *byte = match digits {
                [high, low] => (digit(*high)? * 16 + digit(*low)?) as u8,
                _ => return Err(wrong()),
            };
        }
        Ok(key)
    }

    /// The key's 64 hexadecimal digits.
    pub fn to_hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Why a handshake or a record is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    Malformed(Malformed),
    /// The other side does not hold the key, or bytes were changed, repeated, left out or moved.
    Key,
    /// Another job or epoch, or a node that is not the one that was dialled.
    Identity,
}

impl From<Malformed> for Refused {
    fn from(why: Malformed) -> Self {
        Self::Malformed(why)
    }
}

impl From<snow::Error> for Refused {
    fn from(_: snow::Error) -> Self {
        Self::Key
    }
}

fn noise(
    key: &Key,
    prologue: &[u8],
    dialler: bool,
) -> std::result::Result<snow::HandshakeState, Refused> {
    let parameters = PATTERN.parse().map_err(|_| Refused::Key)?;
    let builder = snow::Builder::new(parameters)
        .psk(0, &key.0)?
        .prologue(prologue)?;
    Ok(if dialler {
        builder.build_initiator()?
    } else {
        builder.build_responder()?
    })
}

/// The dialler's half-open handshake.
pub struct Dialling {
    state: Box<snow::HandshakeState>,
    to: u16,
}

impl Dialling {
    /// Starts a handshake; the bytes are the first record's body.
    pub fn start(key: &Key, opening: Opening) -> std::result::Result<(Self, Vec<u8>), Refused> {
        let plain = opening.encode();
        let mut state = noise(key, &plain, true)?;
        let mut message = [0; 64];
        let length = state.write_message(&[], &mut message)?;
        let record = plain
            .iter()
            .chain(message.iter().take(length))
            .copied()
            .collect();
        Ok((
            Self {
                state: Box::new(state),
                to: opening.to,
            },
            record,
        ))
    }

    /// Reads the answer: the session, and the acceptor's boot id.
    pub fn finish(mut self, answer: &[u8]) -> std::result::Result<(Session, u64), Refused> {
        let mut plain = [0; 64];
        let length = if answer.len() == ANSWER {
            self.state.read_message(answer, &mut plain)?
        } else {
            0
        };
        let Some((node, rest)) = plain.split_first_chunk::<2>().filter(|_| length == 10) else {
            return Err(Malformed::Length.into());
        };
        let Some(boot) = rest.first_chunk::<8>() else {
            return Err(Malformed::Length.into());
        };
        if u16::from_le_bytes(*node) != self.to {
            return Err(Refused::Identity);
        }
        Ok((
            Session(Box::new(self.state.into_transport_mode()?)),
            u64::from_le_bytes(*boot),
        ))
    }
}

/// The acceptor's whole handshake: the session, the answer's bytes, and what the dialler said.
pub fn accept(
    key: &Key,
    own: &Opening,
    first: &[u8],
) -> std::result::Result<(Session, Vec<u8>, Opening), Refused> {
    let Some((plain, message)) = first
        .split_at_checked(OPENING)
        .filter(|_| first.len() == FIRST)
    else {
        return Err(Malformed::Length.into());
    };
    let opening = Opening::decode(plain)?;
    // Cheap to check, so before the elliptic curve; the handshake then proves it.
    if (opening.job, opening.epoch, opening.to) != (own.job, own.epoch, own.from) {
        return Err(Refused::Identity);
    }
    let mut state = noise(key, plain, false)?;
    state.read_message(message, &mut [0; 16])?;
    let mut identity = own.from.to_le_bytes().to_vec();
    identity.extend_from_slice(&own.boot.to_le_bytes());
    let mut answer = vec![0; ANSWER];
    let length = state.write_message(&identity, &mut answer)?;
    answer.truncate(length);
    Ok((
        Session(Box::new(state.into_transport_mode()?)),
        answer,
        opening,
    ))
}

/// Both keys of an established connection. Nonces count up, so nothing can be repeated, left out or moved.
pub struct Session(Box<snow::TransportState>);

impl Session {
    /// Appends `plain`, at most [`MAX_PLAIN`] bytes, to `out` as one record.
    pub fn seal(&mut self, plain: &[u8], out: &mut Vec<u8>) -> std::result::Result<(), Refused> {
        if plain.len() > MAX_PLAIN {
            return Err(Malformed::Length.into());
        }
        let mut sealed = vec![0; plain.len() + TAG];
        let length = self.0.write_message(plain, &mut sealed)?;
        out.extend_from_slice(&(length as u16).to_le_bytes());
        out.extend(sealed.into_iter().take(length));
        Ok(())
    }

    pub fn open(&mut self, sealed: &[u8]) -> std::result::Result<Vec<u8>, Refused> {
        let mut plain = vec![0; sealed.len()];
        let length = self.0.read_message(sealed, &mut plain)?;
        plain.truncate(length);
        Ok(plain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opening(from: u16, to: u16) -> Opening {
        Opening {
            job: 7,
            epoch: 1,
            from,
            to,
            boot: 99,
        }
    }

    fn pair() -> (Session, Session) {
        let key = Key::new([3; 32]);
        let (dialling, first) = Dialling::start(&key, opening(0, 1)).unwrap();
        let (there, answer, said) = accept(&key, &opening(1, 0), &first).unwrap();
        assert_eq!(
            (said, first.len(), answer.len()),
            (opening(0, 1), FIRST, ANSWER)
        );
        (dialling.finish(&answer).unwrap().0, there)
    }

    #[test]
    fn sealed_records_open_once_and_in_order() {
        let (mut here, mut there) = pair();
        let (mut one, mut two) = (Vec::new(), Vec::new());
        here.seal(b"one", &mut one).unwrap();
        here.seal(b"two", &mut two).unwrap();
        assert_eq!(there.open(&two[2..]), Err(Refused::Key), "reordered");
        assert_eq!(there.open(&one[2..]).unwrap(), b"one");
        assert_eq!(there.open(&one[2..]), Err(Refused::Key), "replayed");
        assert_eq!(there.open(&two[2..10]), Err(Refused::Key), "truncated");
        assert_eq!(there.open(&two[2..]).unwrap(), b"two");
        assert_eq!(
            here.seal(&vec![0; MAX_PLAIN + 1], &mut one),
            Err(Malformed::Length.into())
        );
    }

    #[test]
    fn every_changed_bit_of_a_handshake_is_refused() {
        let key = Key::new([3; 32]);
        let (_, first) = Dialling::start(&key, opening(0, 1)).unwrap();
        for at in 0..first.len() {
            let mut bytes = first.clone();
            bytes[at] ^= 1 << (at % 8);
            assert!(accept(&key, &opening(1, 0), &bytes).is_err(), "byte {at}");
        }
        let (_, answer, _) = accept(&key, &opening(1, 0), &first).unwrap();
        let (dialling, _) = Dialling::start(&key, opening(0, 1)).unwrap();
        assert!(
            dialling.finish(&answer).is_err(),
            "the answer to another first message"
        );
    }

    #[test]
    fn another_key_job_or_node_is_refused() {
        let (dialling, first) = Dialling::start(&Key::new([3; 32]), opening(0, 1)).unwrap();
        let other = accept(&Key::new([4; 32]), &opening(1, 0), &first).map(|_| ());
        assert_eq!(other, Err(Refused::Key));
        let job = Opening {
            job: 8,
            ..opening(1, 0)
        };
        assert_eq!(
            accept(&Key::new([3; 32]), &job, &first).map(|_| ()),
            Err(Refused::Identity)
        );
        assert_eq!(
            accept(&Key::new([3; 32]), &opening(2, 0), &first).map(|_| ()),
            Err(Refused::Identity)
        );
        assert!(dialling.finish(&[0; ANSWER]).is_err());
    }
}
