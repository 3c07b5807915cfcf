//! Any bytes through the record reader, the frame decoder and the table of peers.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tsugi_kpool::sideband::frame::{Frame, MAX_RECORD, record};
use tsugi_kpool::sideband::peer::Settings;
use tsugi_kpool::sideband::table::Table;

fuzz_target!(|data: &[u8]| {
    let settings = Settings {
        node: 1,
        nodes: 40,
        full_mesh: 32,
        boot: 3,
        heartbeat: 50_000_000,
        dead_after: 5_000_000_000,
        expire_after: 60_000_000_000,
    };
    let mut now = 1_000_000_000;
    let mut table = Table::new(settings, now);
    // A neighbour, and a node further away that probes this one.
    let links = [(0, table.name_link()), (11, table.name_link())];
    for (node, link) in links {
        assert!(table.linked(now, node, 4, link).is_ok());
    }
    let mut turn = links.iter().cycle();
    let mut rest = data;
    while let Ok(Some((body, length))) = record(rest, MAX_RECORD) {
        if let Ok(frame) = Frame::decode(body) {
            assert_eq!(frame.encode(), body);
        }
        now += 10_000_000;
        let Some(&(_, link)) = turn.next() else { break };
        if table.received(now, link, body).is_err() {
            break;
        }
        table.tick(now);
        assert_eq!(table.views(now).len(), 39);
        rest = &rest[length..];
    }
});
