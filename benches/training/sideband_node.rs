//! What the sideband costs while the job is idle and while it steps: processor time, bytes, and the call that training makes.
//!
//! `cargo bench --bench sideband_node`: 32 agents in one process, in full mesh (31 peers each), heartbeats of
//! 50 ms, for ten seconds each. Numbers are per agent. 32 agents share the caches and the scheduler with
//! each other, which one agent a host does not, so a host's own is not above this.

use std::time::{Duration, Instant};
use tsugi_kpool::sideband::node::{Agent, Bound, Config};
use tsugi_kpool::sideband::peer::State;
use tsugi_kpool::sideband::session::Key;
use tsugi_kpool::sideband::table::FULL_MESH;

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

/// Ten seconds, with a call each 50 ms.
fn measure(what: &str, agents: &[Agent], mut work: impl FnMut(u32)) {
    let sent = || {
        agents
            .iter()
            .map(|a| a.snapshot().1.bytes_sent)
            .sum::<u64>() as f64
    };
    let (bytes, processor, start) = (sent(), processor_seconds(), Instant::now());
    for call in 0..200 {
        work(call);
        std::thread::sleep(Duration::from_millis(50));
    }
    let (wall, count) = (start.elapsed().as_secs_f64(), agents.len() as f64);
    let after = processor_seconds();
    let percent = |seconds: f64| 100.0 * seconds / wall / count;
    let (user, system) = (
        percent(after.0 - processor.0),
        percent(after.1 - processor.1),
    );
    let rate = (sent() - bytes) / wall / count / (count - 1.0);
    println!(
        "  {what:20} {user:.2} + {system:.2} = {:.2} % user + system, {:.2} kB/s",
        user + system,
        rate / 1e3
    );
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
    // Longer than a job counts as stepping after its start.
    std::thread::sleep(Duration::from_secs(4));
    println!(
        "sideband, {} peers, heartbeat 50 ms; processor time of a core an agent, bytes to a peer",
        nodes - 1
    );
    measure("idle", &agents, |_| {});
    let mut step = 0;
    measure("a step each 100 ms", &agents, |call| {
        for agent in agents.iter().filter(|_| call % 2 == 0) {
            agent.report_step(step, 100.0, 0.5, 0, 0);
        }
        step += i64::from(call % 2 == 0);
    });

    let calls = 100_000;
    let start = Instant::now();
    for call in 0..calls {
        agents[0].report_step(step + call, 1.0, 0.5, 0, 0);
    }
    println!(
        "  report_step {:.0} ns a call",
        start.elapsed().as_nanos() as f64 / calls as f64
    );
    for agent in agents {
        assert!(agent.stop());
    }
}
