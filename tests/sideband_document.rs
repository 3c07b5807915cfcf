//! docs/sideband.md describes the wire that the code speaks: every number and every field of it.

use std::collections::HashMap;
use tsugi_kpool::sideband::frame::{
    Body, Frame, Heartbeat, MAGIC, MAX_INTERVAL_MS, MAX_RECORD, MAX_RUMOURS, Malformed, NO_STEP,
    OPENING, Opening, Rumour, VERSION, kind, record,
};
use tsugi_kpool::sideband::link::{Ending, Refusal};
use tsugi_kpool::sideband::node::Counts;
use tsugi_kpool::sideband::peer::PHI_SUSPECT;
use tsugi_kpool::sideband::session::{ANSWER, EPHEMERAL, FIRST, MAX_PLAIN, PATTERN, TAG};
use tsugi_kpool::sideband::table::{FULL_MESH, MAX_NODES};

const DOCUMENT: &str = include_str!("../docs/sideband.md");

/// The text below a heading that begins so, up to the next one, its lines joined.
fn section(heading: &str) -> String {
    let start = DOCUMENT.find(&format!("## {heading}")).expect(heading);
    let rest = &DOCUMENT[start + 3..];
    let text = &rest[..rest.find("\n## ").unwrap_or(rest.len())];
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The second cell of the row of that name.
fn cell<'a>(text: &'a str, row: &str) -> &'a str {
    let start = text.find(&format!("| {row} | ")).expect(row) + row.len() + 5;
    let rest = &text[start..];
    rest[..rest.find(" |").unwrap()].trim()
}

/// A sample's bytes, laid out by the document: `name type` with commas between.
fn layout(fields: &str, sample: &HashMap<&str, u64>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for field in fields.split(", ") {
        let (name, kind) = field.split_once(' ').expect(field);
        let width = match kind {
            "u8" => 1,
            "u16" => 2,
            "u32" | "f32" => 4,
            "u64" | "i64" => 8,
            _ => panic!("{field}: what is {kind}?"),
        };
        let value = sample
            .get(name)
            .unwrap_or_else(|| panic!("the code has no {name}"));
        bytes.extend_from_slice(&value.to_le_bytes()[..width]);
    }
    bytes
}

fn framed(kind: u64, body: Vec<u8>) -> Vec<u8> {
    let text = section("Wire format");
    let head = cell(&text, "frame")
        .strip_suffix(", then the body")
        .unwrap();
    let sample = HashMap::from([
        ("version", u64::from(VERSION)),
        ("type", kind),
        ("sequence", 77),
    ]);
    [layout(head, &sample), body].concat()
}

/// A body's number and fields, by its name.
fn body(name: &str) -> (u64, String) {
    let text = section("Wire format");
    let at = text.find(&format!(" {name} | ")).expect(name);
    let number = text[..at].rsplit(' ').next().unwrap().parse().unwrap();
    (
        number,
        cell(&text, &format!("body {number} {name}")).to_owned(),
    )
}

#[test]
fn every_number_of_the_wire_is_the_codes() {
    let text = section("Wire format");
    for sentence in [
        format!("Wire format, version {VERSION}"),
        format!("A record is a `u16` length, 1 to {MAX_RECORD},"),
        format!(
            "opening ({OPENING}), then Noise message 1 ({}): {FIRST} in all",
            FIRST - OPENING
        ),
        format!(
            "Noise message 2 ({ANSWER}): key ({EPHEMERAL}), tag ({TAG}), and between them sealed ({}): node u16, boot u64",
            ANSWER - EPHEMERAL - TAG
        ),
        format!("plain text (at most {MAX_PLAIN}) and a tag ({TAG})"),
        format!("The pattern is `{PATTERN}`"),
        format!("magic \"{}\"", std::str::from_utf8(&MAGIC).unwrap()),
        format!("count u8 (at most {MAX_RUMOURS})"),
        format!("`step` is {NO_STEP} before the first"),
        format!("`next_ms`, 1 to {MAX_INTERVAL_MS},"),
        format!("more than {FULL_MESH} nodes"),
    ] {
        assert!(
            text.contains(&sentence),
            "docs/sideband.md does not say: {sentence}"
        );
    }
    let limits = section("Limits");
    assert!(limits.contains(&format!("{MAX_NODES} nodes.")), "{limits}");
    assert!(section("What is measured").contains(&format!("phi passes {PHI_SUSPECT}")));
}

#[test]
fn a_length_is_what_the_document_says() {
    for (length, taken) in [
        (1, true),
        (MAX_RECORD, true),
        (0, false),
        (MAX_RECORD + 1, false),
    ] {
        let bytes = [&(length as u16).to_le_bytes()[..], &vec![0; length]].concat();
        assert_eq!(record(&bytes, MAX_RECORD).is_ok(), taken, "{length}");
    }
}

#[test]
fn an_opening_is_laid_out_as_documented() {
    let text = section("Wire format");
    let fields = cell(&text, "opening").split_once(", ").unwrap().1;
    let opening = Opening {
        job: 0x1112_1314_1516_1718,
        epoch: 21,
        from: 0x3132,
        to: 0x4142,
        boot: 0x5152_5354_5556_5758,
    };
    let sample = HashMap::from([
        ("version", u64::from(VERSION)),
        ("zero", 0),
        ("job", opening.job),
        ("epoch", opening.epoch),
        ("from", opening.from.into()),
        ("to", opening.to.into()),
        ("boot", opening.boot),
    ]);
    let documented = [&MAGIC[..], &layout(fields, &sample)].concat();
    assert_eq!(documented, opening.encode());
    assert_eq!(Opening::decode(&documented), Ok(opening));
}

#[test]
fn every_body_is_laid_out_as_documented() {
    let heartbeat = Heartbeat {
        beat: 0x0102_0304_0506_0708,
        sent: 0x1112_1314_1516_1718,
        echo_sent: 0x2122_2324_2526_2728,
        echo_received: 0x0132_3334_3536_3738,
        step: 0x1142_4344_4546_4748,
        step_at: 0x0152_5354_5556_5758,
        step_ns: 0x6162_6364_6566_6768,
        next_ms: 0x0172,
        fill: 0.625,
        fires: 0x8182_8384,
        holds: 0x9192_9394,
    };
    let sample = HashMap::from([
        ("beat", heartbeat.beat),
        ("sent", heartbeat.sent as u64),
        ("echo_sent", heartbeat.echo_sent as u64),
        ("echo_received", heartbeat.echo_received as u64),
        ("step", heartbeat.step as u64),
        ("step_at", heartbeat.step_at as u64),
        ("step_ns", heartbeat.step_ns),
        ("next_ms", heartbeat.next_ms.into()),
        ("fill", heartbeat.fill.to_bits().into()),
        ("fires", heartbeat.fires.into()),
        ("holds", heartbeat.holds.into()),
    ]);
    let rumours = [3u16, 4].map(|node| Rumour {
        node,
        boot: 5,
        beat: 6 + u64::from(node),
        step: -1,
    });
    let rumour = |r: &Rumour| {
        HashMap::from([
            ("node", u64::from(r.node)),
            ("boot", r.boot),
            ("beat", r.beat),
            ("step", r.step as u64),
        ])
    };
    let (gossip_type, gossip) = body("gossip");
    let (count, each) = gossip.split_once(" (at most ").unwrap();
    let each = each.split_once("then for each: ").unwrap().1;
    let count = layout(count, &HashMap::from([("count", 2)]));
    let rumours_bytes: Vec<u8> = rumours
        .iter()
        .flat_map(|r| layout(each, &rumour(r)))
        .collect();

    let (heartbeat_type, fields) = body("heartbeat");
    let (bye_type, nothing) = body("bye");
    assert_eq!(nothing, "nothing");
    let (probe_type, probe) = body("probe");
    for (documented, said) in [
        (
            framed(heartbeat_type, layout(&fields, &sample)),
            Body::Heartbeat(heartbeat),
        ),
        (
            framed(gossip_type, [count, rumours_bytes].concat()),
            Body::Gossip(rumours.to_vec()),
        ),
        (framed(bye_type, Vec::new()), Body::Bye),
        (
            framed(probe_type, layout(&probe, &HashMap::from([("node", 9)]))),
            Body::Probe(9),
        ),
    ] {
        let frame = Frame {
            sequence: 77,
            body: said,
        };
        assert_eq!(documented, frame.encode());
        assert_eq!(Frame::decode(&documented), Ok(frame));
    }
}

#[test]
fn the_table_of_bodies_is_the_codes() {
    let text = section("Wire format");
    let documented: Vec<(u8, &str)> = text
        .split("| body ")
        .skip(1)
        .map(|row| {
            let (name, _) = row.split_once(" |").unwrap();
            let (number, name) = name.split_once(' ').unwrap();
            (number.parse().unwrap(), name)
        })
        .collect();
    assert_eq!(documented, kind::ALL);
    // And no other number is a body.
    for number in 0..=u8::MAX {
        let framed = framed(number.into(), Vec::new());
        let known = Frame::decode(&framed) != Err(Malformed::Type);
        assert_eq!(
            known,
            kind::ALL.iter().any(|(n, _)| *n == number),
            "{number}"
        );
    }
}

#[test]
fn every_reason_that_is_counted_is_explained() {
    let text = section("Threat model");
    for name in Refusal::ALL
        .map(|r| r.1)
        .into_iter()
        .chain(Ending::ALL.map(|e| e.1))
    {
        assert!(
            text.contains(&format!("`{name}`")),
            "docs/sideband.md does not explain {name}"
        );
    }
    // The names are read by position, so the lists are in the order of the counts.
    assert!(
        Refusal::ALL
            .iter()
            .enumerate()
            .all(|(at, (why, _))| *why as usize == at)
    );
    assert!(
        Ending::ALL
            .iter()
            .enumerate()
            .all(|(at, (why, _))| *why as usize == at)
    );
    assert_eq!(Counts::default().refused.len(), Refusal::ALL.len());
}
