//! Real agents in one process: 256 of them, shutdown, and a mutation fuzzer for everything that reads foreign bytes.

mod sideband_agents;

use sideband_agents::{Insider, start, until};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Mutex;
use std::time::{Duration, Instant, UNIX_EPOCH};
use tsugi_kpool::sideband::frame::{Body, Frame, MAX_RECORD, MAX_RUMOURS, Opening, Rumour, record};
use tsugi_kpool::sideband::link::Refusal;
use tsugi_kpool::sideband::node::{Agent, Bound, Config};
use tsugi_kpool::sideband::peer::{Settings, State};
use tsugi_kpool::sideband::session::{Dialling, Key, accept};
use tsugi_kpool::sideband::table::Table;

/// Held by the test that measures the memory of this process, and by the one that takes much of it.
static MEMORY: Mutex<()> = Mutex::new(());

#[test]
fn two_hundred_and_fifty_six_nodes_hear_of_each_other() {
    let _memory = MEMORY.lock().unwrap();
    let (_, agents) = start(256, 500, 20_000);
    until(120, || {
        agents.iter().all(|agent| {
            agent
                .snapshot()
                .0
                .iter()
                .all(|view| view.state == State::Alive)
        })
    });
    for agent in &agents {
        agent.report_step(3, 1.0, 0.0, 0, 0);
    }
    until(120, || {
        agents
            .iter()
            .all(|agent| agent.snapshot().0.iter().all(|view| view.step == 3))
    });
    assert!(
        agents.iter().all(Agent::stop),
        "an agent did not stop within a second"
    );
}

#[test]
fn a_recorded_connection_played_again_gets_no_further_than_the_handshake() {
    let (peers, agents) = start(2, 50, 20_000);
    until(10, || {
        agents
            .iter()
            .all(|agent| agent.snapshot().0[0].state == State::Alive)
    });
    assert!(agents[0].stop());
    // What node 0 would have said: a first record under the right key, and a sealed record that belongs to another session.
    let key = Key::new([7; 32]);
    let opening = Opening {
        job: 1,
        epoch: 0,
        from: 0,
        to: 1,
        boot: 5,
    };
    let (dialling, first) = Dialling::start(&key, opening).unwrap();
    let (_, answer, _) = accept(
        &key,
        &Opening {
            from: 1,
            to: 0,
            ..opening
        },
        &first,
    )
    .unwrap();
    let (mut session, _) = dialling.finish(&answer).unwrap();
    let mut recorded = (first.len() as u16).to_le_bytes().to_vec();
    recorded.extend_from_slice(&first);
    session
        .seal(
            &Frame {
                sequence: 0,
                body: Body::Bye,
            }
            .encode(),
            &mut recorded,
        )
        .unwrap();
    until(5, || agents[1].snapshot().0[0].state == State::Dead);
    let refused = |agent: &Agent| agent.snapshot().1.refused[0];
    let before = refused(&agents[1]);
    let mut stream = TcpStream::connect(&peers[1]).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    stream.write_all(&recorded).unwrap();
    let _ = stream.read_to_end(&mut Vec::new());
    until(5, || refused(&agents[1]) == before + 1);
    assert_ne!(
        agents[1].snapshot().0[0].boot,
        5,
        "the replayed boot was believed"
    );
}

fn resident_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_host_with_the_key_cannot_take_an_id_flood_or_repeat_and_the_others_do_not_notice() {
    let _memory = MEMORY.lock().unwrap();
    let (peers, mut agents) = start(3, 50, 20_000);
    let (agent, other) = (agents.pop().unwrap(), agents.pop().unwrap());
    assert!(agents.pop().unwrap().stop());
    let refused = |why: Refusal| agent.snapshot().1.refused[why as usize];
    until(20, || agent.snapshot().0[1].state == State::Alive);
    let boots = agent.snapshot().0[1].boot;

    let before = refused(Refusal::Identity);
    for (count, from) in [1, 2, 9].into_iter().enumerate() {
        assert!(
            Insider::dial(&peers[2], from, 2, 5).is_none(),
            "answered as {from}"
        );
        until(5, || {
            refused(Refusal::Identity) == before + 1 + count as u64
        });
    }

    let (mut start, mut boot) = (0, 100);
    let mut dial = || {
        boot += 1;
        Insider::dial(&peers[2], 0, 2, boot).unwrap()
    };
    let attack = |why: Refusal, insider: &mut Insider, bytes: &[u8]| {
        let before = refused(why);
        insider.send(bytes);
        until(5, || refused(why) == before + 1);
    };
    for round in 0..100 {
        other.report_step(round, 20.0, 0.5, 0, 0);
        let mut flood = dial();
        let bytes: Vec<u8> = (0..400).flat_map(|_| flood.heartbeat()).collect();
        attack(Refusal::Flood, &mut flood, &bytes);

        let mut repeated = dial();
        let (first, second) = (repeated.heartbeat(), repeated.heartbeat());
        attack(
            Refusal::Malformed,
            &mut repeated,
            &[&first[..], &second, &second].concat(),
        );

        let mut moved = dial();
        let (first, second, third) = (moved.heartbeat(), moved.heartbeat(), moved.heartbeat());
        attack(
            Refusal::Malformed,
            &mut moved,
            &[first, third, second].concat(),
        );

        let mut left_out = dial();
        let first = left_out.heartbeat();
        left_out.frames += 1;
        let third = left_out.heartbeat();
        attack(Refusal::Sequence, &mut left_out, &[first, third].concat());
        if round == 10 {
            start = resident_kib();
        }
        until(5, || agent.snapshot().0[1].step == round);
        let view = agent.snapshot().0[1];
        assert_eq!((view.state, view.boot), (State::Alive, boots));
    }
    let grown = resident_kib().saturating_sub(start);
    assert!(grown < 10_000, "{grown} KiB more after 90 rounds");

    // A record that comes a byte at a time is silence: the link goes.
    let mut drip = dial();
    let first = drip.heartbeat();
    drip.stream.write_all(&first).unwrap();
    until(5, || agent.snapshot().0[0].boot == 100 + 401);
    let slow = drip.heartbeat();
    let closed = slow.iter().any(|byte| {
        std::thread::sleep(Duration::from_millis(100));
        drip.stream.write_all(&[*byte]).is_err()
    });
    assert!(closed, "{} bytes in as many tenths of a second", slow.len());
    assert_eq!(agent.snapshot().0[1].state, State::Alive);
    assert!(agent.stop() && other.stop());
}

#[test]
fn a_port_is_free_when_stop_returns() {
    let (peers, mut agents) = start(3, 50, 20_000);
    let own = agents.remove(0);
    assert!(own.stop());
    for _ in 0..100 {
        let bound = Bound::listen(&peers[0]).unwrap();
        let config = Config {
            node: 0,
            peers: peers.clone(),
            key: Key::new([7; 32]),
            job: 1,
            epoch: 0,
            heartbeat_ms: 50,
            dead_after_ms: 5000,
            expire_after_ms: 60_000,
        };
        let agent = Agent::start(bound, config).unwrap();
        assert!(agent.stop() && agent.stop());
        drop(TcpStream::connect(&peers[0]).expect_err("something still listens"));
    }
}

#[test]
fn a_taken_port_and_wrong_settings_are_errors() {
    let bound = Bound::listen("127.0.0.1:0").unwrap();
    let address = format!("127.0.0.1:{}", bound.port());
    assert!(
        Bound::listen(&address)
            .err()
            .unwrap()
            .to_string()
            .contains(&address)
    );
    let config = Config {
        node: 3,
        peers: vec![address],
        key: Key::new([7; 32]),
        job: 1,
        epoch: 0,
        heartbeat_ms: 50,
        dead_after_ms: 5000,
        expire_after_ms: 60_000,
    };
    assert!(
        Agent::start(bound, config)
            .err()
            .unwrap()
            .to_string()
            .contains("node is 3 of 1")
    );
}

/// Ten seconds, beside the test of 256 nodes, which mostly waits; `SIDEBAND_FUZZ_SECONDS=60` for longer. fuzz/ has libFuzzer.
/// Other bytes in each run: what fails says its seed, and `SIDEBAND_FUZZ_SEED` repeats it.
#[test]
fn mutated_bytes_never_get_past_a_reader() {
    let given = |name| std::env::var(name).ok().and_then(|s| s.parse::<f64>().ok());
    let seconds = given("SIDEBAND_FUZZ_SECONDS").unwrap_or(10.0);
    let clock = || f64::from(UNIX_EPOCH.elapsed().unwrap().subsec_nanos());
    let seed = given("SIDEBAND_FUZZ_SEED").unwrap_or_else(clock) as u64;
    println!("SIDEBAND_FUZZ_SEED={seed}");
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    let mut state = 0x1234_5678_9abc_def1_u64 ^ seed;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let key = Key::new([9; 32]);
    let own = Opening {
        job: 1,
        epoch: 0,
        from: 1,
        to: 0,
        boot: 3,
    };
    let (_, first) = Dialling::start(
        &key,
        Opening {
            from: 0,
            to: 1,
            ..own
        },
    )
    .unwrap();
    let rumour = Rumour {
        node: 2,
        boot: 4,
        beat: 5,
        step: 6,
    };
    let corpus = [
        Frame {
            sequence: 0,
            body: Body::Gossip(vec![rumour; MAX_RUMOURS]),
        }
        .encode(),
        Frame {
            sequence: 0,
            body: Body::Bye,
        }
        .encode(),
        Frame {
            sequence: 0,
            body: Body::Probe(7),
        }
        .encode(),
        [vec![1, 1], vec![0; 64], vec![50, 0], vec![0; 12]].concat(),
        first.clone(),
    ];
    let settings = Settings {
        node: 1,
        nodes: 40,
        full_mesh: 32,
        boot: 3,
        heartbeat: 50_000_000,
        dead_after: 5_000_000_000,
        expire_after: 60_000_000_000,
    };
    let (mut tried, mut decoded, mut now) = (0u64, 0u64, 1_000_000_000);
    while tried < 2000 || Instant::now() < end {
        let mut bytes = corpus[random(corpus.len())].clone();
        for _ in 0..random(6) {
            match random(3) {
                0 if !bytes.is_empty() => bytes.truncate(random(bytes.len() + 1)),
                1 => bytes.push(random(256) as u8),
                _ if !bytes.is_empty() => {
                    let at = random(bytes.len());
                    bytes[at] = random(256) as u8;
                }
                _ => {}
            }
        }
        tried += 1;
        if let Ok(frame) = Frame::decode(&bytes) {
            decoded += 1;
            assert_eq!(frame.encode(), bytes);
        }
        if let Ok(Some((body, length))) = record(&bytes, MAX_RECORD) {
            assert!(length == body.len() + 2 && length <= bytes.len());
        }
        if bytes != first {
            assert!(
                accept(&key, &own, &bytes).is_err(),
                "accepted without the key: {bytes:?}"
            );
        }
        now += 60_000_000;
        let mut table = Table::new(settings.clone(), now);
        let link = table.name_link();
        table.linked(now, 0, 4, link).unwrap();
        let _ = table.received(now, link, &bytes);
        assert_eq!(table.views(now).len(), 39);
    }
    assert!(
        decoded > tried / 100,
        "{decoded} of {tried}: the corpus is not a corpus"
    );
}
