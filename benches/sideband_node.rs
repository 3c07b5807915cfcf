//! What the sideband costs while nothing happens: processor time, bytes, and the call that training makes.
//!
//! `cargo bench --bench sideband_node`: 32 agents in one process, in full mesh (31 peers each), heartbeats of
//! 50 ms, for ten seconds after all are alive. Numbers are per agent. 32 agents share the caches and the scheduler with
//! each other, which one agent a host does not, so a host's own is not above this.

use std::time::{Duration, Instant};
use tsugi_kpool::sideband::node::{Agent, Bound, Config};
use tsugi_kpool::sideband::peer::{FULL_MESH, State};
use tsugi_kpool::sideband::session::Key;

/// User and system seconds of this process so far.
fn processor_seconds() -> (f64, f64) {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    let seconds = |at: usize| fields[at].parse::<f64>().unwrap() / 100.0;
    (seconds(11), seconds(12))
}

fn main() {
    let nodes = usize::from(FULL_MESH);
    let bound: Vec<Bound> = (0..nodes)
        .map(|_| Bound::listen("127.0.0.1:0").unwrap())
        .collect();
    let peers: Vec<String> = bound
        .iter()
        .map(|b| format!("127.0.0.1:{}", b.port()))
        .collect();
    let agents: Vec<Agent> = bound
        .into_iter()
        .enumerate()
        .map(|(node, bound)| {
            let config = Config {
                node: node as u16,
                peers: peers.clone(),
                key: Key::new([1; 32]),
                job: 1,
                epoch: 0,
                heartbeat_ms: 50,
                dead_after_ms: 5000,
                expire_after_ms: 60_000,
            };
            Agent::start(bound, config).unwrap()
        })
        .collect();
    while !agents
        .iter()
        .all(|a| a.snapshot().0.iter().all(|v| v.state == State::Alive))
    {
        std::thread::sleep(Duration::from_millis(50));
    }
    let sent = || {
        agents
            .iter()
            .map(|a| a.snapshot().1.bytes_sent)
            .sum::<u64>() as f64
    };
    let (bytes, processor, start) = (sent(), processor_seconds(), Instant::now());
    std::thread::sleep(Duration::from_secs(10));
    let (wall, count) = (start.elapsed().as_secs_f64(), nodes as f64);
    let after = processor_seconds();
    let percent = |seconds: f64| 100.0 * seconds / wall / count;
    let (user, system) = (
        percent(after.0 - processor.0),
        percent(after.1 - processor.1),
    );
    let rate = (sent() - bytes) / wall / count / (count - 1.0);
    println!("sideband idle, {} peers, heartbeat 50 ms", nodes - 1);
    println!("  processor  {user:.2} + {system:.2} % of a core an agent, user + system");
    println!("  network    {:.1} kB/s sent to a peer", rate / 1e3);

    let calls = 100_000;
    let start = Instant::now();
    for step in 0..calls {
        agents[0].report_step(step, 1.0, 0.5, 0, 0);
    }
    println!(
        "  report_step {:.0} ns a call",
        start.elapsed().as_nanos() as f64 / calls as f64
    );
    for agent in agents {
        assert!(agent.stop());
    }
}
