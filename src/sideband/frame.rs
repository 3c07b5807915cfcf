//! The wire format, stated here alone: frames as pure bytes. Lengths are checked before anything is read, and nothing is
//! allocated from a length. `docs/sideband.md` describes it for other programs, and `tests/sideband_document.rs` holds the
//! description against this file.

/// The version of the wire format, in the opening and in every frame. It changes when a node of the old version would
/// refuse or misread what a new one sends: another length, order or meaning of a field, a new body, a wider range. Nodes
/// of two versions refuse each other at the opening, so no reader has to know two.
pub const VERSION: u8 = 1;
/// No record is longer, its two bytes of length not counted.
pub const MAX_RECORD: usize = 4096;
/// Bytes of an [`Opening`].
pub const OPENING: usize = 34;
/// Most entries of one gossip frame.
pub const MAX_RUMOURS: usize = 64;
/// Longest time between two heartbeats.
pub const MAX_INTERVAL_MS: u16 = 10_000;
/// `step` of a node that has not reached one.
pub const NO_STEP: i64 = -1;

/// The first bytes of an [`Opening`].
pub const MAGIC: [u8; 4] = *b"TKSB";
/// Bytes of one [`Rumour`].
const RUMOUR: usize = 26;

/// Why bytes are not a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    Length,
    Magic,
    Version,
    Type,
    /// A field holds what no sender writes: a number that is not finite, a negative time span.
    Field,
}

/// What the dialler says in plain text; the handshake fails if a bit of it is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opening {
    pub job: u64,
    pub epoch: u64,
    pub from: u16,
    pub to: u16,
    pub boot: u64,
}

/// A node's own report, twenty times a second while training steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heartbeat {
    /// Heartbeat periods since the node started.
    pub beat: u64,
    /// When it was sent, ns of the sender's clock.
    pub sent: i64,
    /// `sent` of the last heartbeat received on this connection, and when it came; -1 before the first.
    pub echo_sent: i64,
    pub echo_received: i64,
    /// The last step boundary, [`NO_STEP`] before the first, and when it was passed.
    pub step: i64,
    pub step_at: i64,
    /// Duration of that step in ns.
    pub step_ns: u64,
    /// The next heartbeat comes after so many ms, unless there is news before.
    pub next_ms: u16,
    /// Filled share of the buffer, 0 to 1.
    pub fill: f32,
    pub fires: u32,
    pub holds: u32,
}

/// What a node has heard of a third one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rumour {
    pub node: u16,
    pub boot: u64,
    pub beat: u64,
    pub step: i64,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Body {
    Heartbeat(Heartbeat),
    Gossip(Vec<Rumour>),
    Bye,
    /// Asks the receiver to see for itself whether this node is there.
    Probe(u16),
}

/// A body's number in its frame.
pub mod kind {
    pub const HEARTBEAT: u8 = 1;
    pub const GOSSIP: u8 = 2;
    pub const BYE: u8 = 3;
    pub const PROBE: u8 = 4;
    /// All of them, by name.
    pub const ALL: [(u8, &str); 4] = [
        (HEARTBEAT, "heartbeat"),
        (GOSSIP, "gossip"),
        (BYE, "bye"),
        (PROBE, "probe"),
    ];
}

#[derive(Debug, Clone, PartialEq)]
pub struct Frame {
    pub sequence: u64,
    pub body: Body,
}

/// Takes fixed-size fields off the front of a slice.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(Malformed::Length)?;
        self.0 = rest;
        Ok(*head)
    }
    fn u8(&mut self) -> Result<u8, Malformed> {
        self.take::<1>().map(|b| b[0])
    }
    fn u16(&mut self) -> Result<u16, Malformed> {
        self.take().map(u16::from_le_bytes)
    }
    fn u32(&mut self) -> Result<u32, Malformed> {
        self.take().map(u32::from_le_bytes)
    }
    fn u64(&mut self) -> Result<u64, Malformed> {
        self.take().map(u64::from_le_bytes)
    }
    fn i64(&mut self) -> Result<i64, Malformed> {
        self.take().map(i64::from_le_bytes)
    }
}

impl Opening {
    pub fn encode(&self) -> [u8; OPENING] {
        let mut out = [0; OPENING];
        out[..4].copy_from_slice(&MAGIC);
        out[4] = VERSION;
        out[6..14].copy_from_slice(&self.job.to_le_bytes());
        out[14..22].copy_from_slice(&self.epoch.to_le_bytes());
        out[22..24].copy_from_slice(&self.from.to_le_bytes());
        out[24..26].copy_from_slice(&self.to.to_le_bytes());
        out[26..].copy_from_slice(&self.boot.to_le_bytes());
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        if bytes.len() != OPENING {
            return Err(Malformed::Length);
        }
        let mut r = Reader(bytes);
        if r.take::<4>()? != MAGIC {
            return Err(Malformed::Magic);
        }
        if r.u8()? != VERSION {
            return Err(Malformed::Version);
        }
        if r.u8()? != 0 {
            return Err(Malformed::Field);
        }
        Ok(Self {
            job: r.u64()?,
            epoch: r.u64()?,
            from: r.u16()?,
            to: r.u16()?,
            boot: r.u64()?,
        })
    }
}

impl Frame {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(96);
        let number = match self.body {
            Body::Heartbeat(_) => kind::HEARTBEAT,
            Body::Gossip(_) => kind::GOSSIP,
            Body::Bye => kind::BYE,
            Body::Probe(_) => kind::PROBE,
        };
        out.extend_from_slice(&[VERSION, number]);
        out.extend_from_slice(&self.sequence.to_le_bytes());
        match &self.body {
            Body::Heartbeat(h) => {
                out.extend_from_slice(&h.beat.to_le_bytes());
                for time in [h.sent, h.echo_sent, h.echo_received, h.step, h.step_at] {
                    out.extend_from_slice(&time.to_le_bytes());
                }
                out.extend_from_slice(&h.step_ns.to_le_bytes());
                out.extend_from_slice(&h.next_ms.to_le_bytes());
                out.extend_from_slice(&h.fill.to_le_bytes());
                out.extend_from_slice(&h.fires.to_le_bytes());
                out.extend_from_slice(&h.holds.to_le_bytes());
            }
            Body::Gossip(rumours) => {
                let count = rumours.len().min(MAX_RUMOURS);
                out.push(count as u8);
                for rumour in rumours.iter().take(count) {
                    out.extend_from_slice(&rumour.node.to_le_bytes());
                    out.extend_from_slice(&rumour.boot.to_le_bytes());
                    out.extend_from_slice(&rumour.beat.to_le_bytes());
                    out.extend_from_slice(&rumour.step.to_le_bytes());
                }
            }
            Body::Bye => {}
            Body::Probe(node) => out.extend_from_slice(&node.to_le_bytes()),
        }
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader(bytes);
        if r.u8()? != VERSION {
            return Err(Malformed::Version);
        }
        let number = r.u8()?;
        let sequence = r.u64()?;
        let body = match number {
            kind::HEARTBEAT => Body::Heartbeat(heartbeat(&mut r)?),
            kind::GOSSIP => {
                let count = usize::from(r.u8()?);
                if count > MAX_RUMOURS || r.0.len() != count * RUMOUR {
                    return Err(Malformed::Length);
                }
                let mut rumours = Vec::with_capacity(count);
                for _ in 0..count {
                    rumours.push(Rumour {
                        node: r.u16()?,
                        boot: r.u64()?,
                        beat: r.u64()?,
                        step: r.i64()?,
                    });
                }
                if rumours.iter().any(|rumour| rumour.step < NO_STEP) {
                    return Err(Malformed::Field);
                }
                Body::Gossip(rumours)
            }
            kind::BYE => Body::Bye,
            kind::PROBE => Body::Probe(r.u16()?),
            _ => return Err(Malformed::Type),
        };
        if r.0.is_empty() {
            Ok(Self { sequence, body })
        } else {
            Err(Malformed::Length)
        }
    }
}

fn heartbeat(r: &mut Reader) -> Result<Heartbeat, Malformed> {
    let h = Heartbeat {
        beat: r.u64()?,
        sent: r.i64()?,
        echo_sent: r.i64()?,
        echo_received: r.i64()?,
        step: r.i64()?,
        step_at: r.i64()?,
        step_ns: r.u64()?,
        next_ms: r.u16()?,
        fill: f32::from_le_bytes(r.take()?),
        fires: r.u32()?,
        holds: r.u32()?,
    };
    // Times above 2^62 ns (146 years) would overflow differences.
    let plausible = |time: i64| (-1..1 << 62).contains(&time);
    let times = [h.sent, h.echo_sent, h.echo_received, h.step, h.step_at];
    let awaited = (1..=MAX_INTERVAL_MS).contains(&h.next_ms);
    let ordered = h.step_at <= h.sent && h.echo_received <= h.sent && h.sent >= 0;
    if times.into_iter().all(plausible) && ordered && awaited && (0.0..=1.0).contains(&h.fill) {
        Ok(h)
    } else {
        Err(Malformed::Field)
    }
}

/// A complete record at the front of `buffer`: its bytes, and how many bytes it takes with its length.
/// `Ok(None)` means that more has to come; a length outside `1..=limit` is refused before the rest is read.
pub fn record(buffer: &[u8], limit: usize) -> Result<Option<(&[u8], usize)>, Malformed> {
    let Some((head, rest)) = buffer.split_first_chunk::<2>() else {
        return Ok(None);
    };
    let length = usize::from(u16::from_le_bytes(*head));
    if length == 0 || length > limit {
        return Err(Malformed::Length);
    }
    Ok(rest.get(..length).map(|body| (body, length + 2)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_heartbeat() -> impl Strategy<Value = Heartbeat> {
        let time = -1i64..1 << 62;
        (
            (
                0i64..1 << 62,
                time.clone(),
                time.clone(),
                time.clone(),
                time,
            ),
            (
                any::<u64>(),
                any::<u64>(),
                0f32..=1.0,
                1..=MAX_INTERVAL_MS,
                any::<u32>(),
                any::<u32>(),
            ),
        )
            .prop_map(
                |(
                    (sent, echo_sent, received, step, at),
                    (beat, step_ns, fill, next_ms, fires, holds),
                )| {
                    Heartbeat {
                        beat,
                        sent,
                        echo_sent,
                        echo_received: received.min(sent),
                        step,
                        step_at: at.min(sent),
                        step_ns,
                        next_ms,
                        fill,
                        fires,
                        holds,
                    }
                },
            )
    }

    fn any_body() -> impl Strategy<Value = Body> {
        let rumour = (any::<u16>(), any::<u64>(), any::<u64>(), -1i64..i64::MAX).prop_map(
            |(node, boot, beat, step)| Rumour {
                node,
                boot,
                beat,
                step,
            },
        );
        prop_oneof![
            any_heartbeat().prop_map(Body::Heartbeat),
            prop::collection::vec(rumour, 0..=MAX_RUMOURS).prop_map(Body::Gossip),
            Just(Body::Bye),
            any::<u16>().prop_map(Body::Probe),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_frame_comes_back_and_every_other_length_is_refused(sequence: u64, body in any_body(), cut in 0usize..4096) {
            let frame = Frame { sequence, body };
            let mut bytes = frame.encode();
            prop_assert!(bytes.len() + 16 <= MAX_RECORD);
            prop_assert_eq!(Frame::decode(&bytes), Ok(frame));
            prop_assert!(Frame::decode(&bytes[..cut % bytes.len()]).is_err());
            bytes.push(0);
            prop_assert_eq!(Frame::decode(&bytes), Err(Malformed::Length));
        }

        #[test]
        fn whatever_decodes_encodes_to_the_same_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0u8..5) {
            let mut bytes = bytes;
            if bytes.len() > 1 {
                (bytes[0], bytes[1]) = (VERSION, kind);
            }
            if let Ok(frame) = Frame::decode(&bytes) {
                prop_assert_eq!(frame.encode(), bytes);
            }
        }

        #[test]
        fn an_opening_comes_back(job: u64, epoch: u64, from: u16, to: u16, boot: u64, at in 0usize..6) {
            let opening = Opening { job, epoch, from, to, boot };
            let mut bytes = opening.encode();
            prop_assert_eq!(Opening::decode(&bytes), Ok(opening));
            bytes[at] ^= 1;
            prop_assert!(Opening::decode(&bytes).is_err());
        }
    }

    #[test]
    fn a_length_is_refused_before_its_bytes_come() {
        assert_eq!(record(&[1], 8), Ok(None));
        assert_eq!(record(&[3, 0, 1, 2], 8), Ok(None));
        assert_eq!(record(&[2, 0, 1, 2, 9], 8), Ok(Some((&[1u8, 2][..], 4))));
        assert_eq!(record(&[9, 0], 8), Err(Malformed::Length));
        assert_eq!(record(&[0, 0], 8), Err(Malformed::Length));
    }
}
