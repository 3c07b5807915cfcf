//! A host with the key inside a ring of 34 real agents: it lies about a living far node and about a dead one, and floods.

mod sideband_agents;

use sideband_agents::{Insider, start, until};
use std::io::{Read, Write};
use std::time::{Duration, Instant};
use tsugi_kpool::sideband::frame::{Body, MAX_RUMOURS, Rumour};
use tsugi_kpool::sideband::link::{Ending, Refusal};
use tsugi_kpool::sideband::node::Agent;
use tsugi_kpool::sideband::peer::State;
use tsugi_kpool::sideband::phase::View;

const NODES: u16 = 34;
const HEARTBEAT: Duration = Duration::from_millis(100);
/// Who is lied about.
const VICTIM: u16 = 7;

fn linked(a: u16, b: u16) -> bool {
    let apart = a.abs_diff(b);
    a != b && (apart.is_power_of_two() || (NODES - apart).is_power_of_two())
}

/// What `agent`, of node `node`, knows of `of`.
fn view(agents: &[Option<Agent>], node: u16, of: u16) -> View {
    let agent = agents[usize::from(node)].as_ref().unwrap();
    let (views, _) = agent.snapshot();
    *views.iter().find(|v| v.node == of).unwrap()
}

fn refused(agents: &[Option<Agent>], why: Refusal) -> u64 {
    let count = |agent: &Agent| agent.snapshot().1.refused[why as usize];
    agents.iter().flatten().map(count).sum()
}

/// Node 0: it dials all its neighbours, as an honest node 0 would.
fn insiders(peers: &[String], boot: u64) -> Vec<Insider> {
    let near = (1..NODES).filter(|&node| linked(0, node));
    near.map(|to| Insider::dial(&peers[usize::from(to)], 0, to, boot).expect("a neighbour hung up"))
        .collect()
}

/// Tells all neighbours `rumours`, with the heartbeats of an honest node, until `end`; false if one hangs up.
fn tell(
    insiders: &mut [Insider],
    end: Instant,
    mut rumours: impl FnMut(u64) -> Vec<Rumour>,
) -> bool {
    for insider in insiders.iter() {
        insider.stream.set_nonblocking(true).unwrap();
    }
    for turn in 0.. {
        if Instant::now() >= end {
            break;
        }
        for insider in insiders.iter_mut() {
            let bytes = [
                insider.heartbeat(),
                insider.seal(Body::Gossip(rumours(turn))),
            ]
            .concat();
            if insider.stream.write_all(&bytes).is_err()
                || insider.stream.read(&mut [0; 1 << 16]).is_ok_and(|n| n == 0)
            {
                return false;
            }
        }
        std::thread::sleep(HEARTBEAT);
    }
    true
}

#[test]
fn lies_and_floods_from_inside_a_ring_harm_nobody_who_lives_and_end_with_the_liar() {
    let started = Instant::now();
    let (peers, agents) = start(usize::from(NODES), HEARTBEAT.as_millis() as u64, 2000);
    let mut agents: Vec<Option<Agent>> = agents.into_iter().map(Some).collect();
    assert!(
        agents[0].take().unwrap().stop(),
        "its place is the insider's"
    );
    for agent in agents.iter().flatten() {
        agent.report_step(5, 100.0, 0.0, 0, 0);
    }
    let living: Vec<u16> = (1..NODES).collect();
    let all_know = |agents: &[Option<Agent>], of: &[u16], state: State| {
        let knows = |a: u16| {
            of.iter()
                .all(|&b| a == b || view(agents, a, b).state == state)
        };
        let there = |a: &u16| agents[usize::from(*a)].is_some();
        living.iter().copied().filter(there).all(knows)
    };
    until(60, || all_know(&agents, &living, State::Alive));
    let boot = view(&agents, 1, VICTIM).boot;
    let known = |a: u16, agents: &[Option<Agent>]| view(agents, a, VICTIM).step == 5;
    until(60, || {
        living
            .iter()
            .filter(|&&a| a != VICTIM)
            .all(|&a| known(a, &agents))
    });

    // A living far node: another boot, a beat count and a step far ahead. Nobody believes any of it.
    let lies = [
        (boot, u64::MAX, 1 << 62),
        (boot ^ 1, 1 << 40, 1 << 61),
        (boot, 1 << 50, -1),
    ];
    let lies = lies.map(|(boot, beat, step)| Rumour {
        node: VICTIM,
        boot,
        beat,
        step,
    });
    let mut inside = insiders(&peers, 99);
    let before = refused(&agents, Refusal::Lie);
    assert!(
        tell(&mut inside, Instant::now() + Duration::from_secs(2), |_| {
            lies.to_vec()
        }),
        "hung up on"
    );
    assert!(
        refused(&agents, Refusal::Lie) > before + 100,
        "the lies were not heard"
    );
    for &node in living.iter().filter(|&&n| n != VICTIM) {
        let view = view(&agents, node, VICTIM);
        assert_eq!(
            (view.state, view.boot, view.step),
            (State::Alive, boot, 5),
            "node {node}"
        );
    }

    // A flood of gossip ends its connections, with a count at each, and nobody else's.
    let before = refused(&agents, Refusal::Flood);
    let many = vec![lies[0]; MAX_RUMOURS];
    let flooded = inside.len() as u64;
    for insider in &mut inside {
        let flood: Vec<u8> = (0..200)
            .flat_map(|_| insider.seal(Body::Gossip(many.clone())))
            .collect();
        insider.stream.set_nonblocking(false).unwrap();
        insider.send(&flood);
    }
    until(10, || refused(&agents, Refusal::Flood) == before + flooded);
    assert!(all_know(&agents, &living, State::Alive));

    // As a node that is far from whom it dials it is a probe, which ends in its time: counted, as every end is.
    let far = (1..NODES).find(|&n| !linked(0, n)).unwrap();
    let probes = |agents: &[Option<Agent>]| {
        let counts = agents[usize::from(far)].as_ref().unwrap().snapshot().1;
        counts.closed[Ending::Probe as usize]
    };
    let before = probes(&agents);
    // Refused while the places for others' probes are taken, or while the boot before counts as alive: tried again.
    let mut probe = None;
    until(30, || {
        probe = Insider::dial(&peers[usize::from(far)], 0, far, 99);
        probe.is_some()
    });
    let mut probe = [probe.unwrap()];
    assert!(!tell(
        &mut probe,
        Instant::now() + Duration::from_secs(10),
        |_| lies.to_vec()
    ));
    assert!(probes(&agents) > before);

    // A dead one: while the liar beats for it, nobody who is linked to it takes it for alive; afterwards all know.
    assert!(agents[usize::from(VICTIM)].take().unwrap().stop());
    let (mut inside, mut alive) = (insiders(&peers, 100), 0);
    for _ in 0..8 {
        let end = Instant::now() + Duration::from_secs(1);
        // Its count as it would have gone on, a little ahead: what the liar has heard in others' gossip.
        let beat = || started.elapsed().div_duration_f64(HEARTBEAT) as u64 + 20;
        let tale = |_| {
            vec![Rumour {
                node: VICTIM,
                boot,
                beat: beat(),
                step: 6,
            }]
        };
        assert!(tell(&mut inside, end, tale), "hung up on");
        for &node in living.iter().filter(|&&n| n != VICTIM) {
            let state = view(&agents, node, VICTIM).state;
            alive += u32::from(state == State::Alive);
            assert!(
                !linked(node, VICTIM) || state != State::Alive,
                "node {node}"
            );
        }
    }
    // Who only hears of it takes it for alive: what a host with the key can do beyond 32 nodes (docs/sideband.md).
    assert!(alive > 0, "nobody believed the liar, so nothing was tried");
    drop(inside);
    let others: Vec<u16> = living.iter().copied().filter(|&n| n != VICTIM).collect();
    until(60, || all_know(&agents, &[VICTIM], State::Dead));
    assert!(all_know(&agents, &others, State::Alive));
    assert!(agents.iter().flatten().all(Agent::stop));
}
