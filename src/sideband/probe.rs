//! Probing, beyond the full mesh, as SWIM does (Das et al., DSN 2002).
//!
//! Once a period a node dials one of the nodes that it is not linked to, for a few heartbeats. It takes them in random order,
//! all of them before one comes again, and dials suspects at once. It also asks a few of its neighbours to probe its suspects,
//! and what they hear comes back as gossip. A node that others still hear is suspect here, but not dead.

use super::frame::Body;
use super::link::{Action, Established};
use super::peer::{Peer, State};
use super::table::{MAX_PROBES, PROBE_PERIOD, Table};

/// Suspects that neighbours are asked about in a period.
const MAX_ASKED: usize = 4;
/// How many neighbours are asked to probe one suspect.
const ASKED: usize = 3;

impl Table {
    /// Dials the nodes whose turn it is to be probed, and asks neighbours about suspects.
    pub(super) fn probe(&mut self, now: i64, actions: &mut Vec<Action>) {
        let due = now >= self.next_probe;
        let mut turn = None;
        if due {
            self.next_probe = now + PROBE_PERIOD;
            turn = self.next_turn();
            self.ask(actions);
        }
        for peer in self.peers.iter_mut().filter(|p| p.neighbour) {
            peer.asked &= peer.state == State::Alive;
        }
        let ours = |p: &&Peer| {
            !p.neighbour && (p.dialling.is_some() || p.link.as_ref().is_some_and(|l| l.ours))
        };
        let room = MAX_PROBES.saturating_sub(self.peers.iter().filter(ours).count());
        // The one whose turn it is, then suspects from anywhere on: where they are many, others come first each time.
        let from = (self.random() % self.peers.len().max(1) as u64) as usize;
        let mut order: Vec<usize> = (from..self.peers.len()).chain(0..from).collect();
        order.sort_by_key(|&at| self.peers.get(at).map(|p| p.node) != turn);
        let wanted =
            |p: &Peer| p.asked || turn == Some(p.node) || (due && p.state == State::Suspect);
        order.retain(|&at| {
            let far = self.peers.get(at).filter(|p| !p.neighbour && p.apart());
            far.is_some_and(wanted)
        });
        for at in order.into_iter().take(room) {
            self.dial(at, now, actions);
            if let Some(peer) = self.peers.get(at) {
                turn = turn.filter(|&node| node != peer.node);
            }
        }
        let linked = |&node: &u16| {
            self.peers
                .iter()
                .any(|p| p.node == node && p.link.is_some())
        };
        if let Some(node) = turn.filter(|node| !linked(node)) {
            self.turns.push(node); // no room: it comes next
        }
    }

    /// The next of the nodes without a link, in an order that is drawn anew when all had their turn.
    fn next_turn(&mut self) -> Option<u16> {
        if self.turns.is_empty() {
            let far = self.peers.iter().filter(|p| !p.neighbour);
            self.turns = far.map(|p| p.node).collect();
            for last in (1..self.turns.len()).rev() {
                let other = (self.random() % (last as u64 + 1)) as usize;
                self.turns.swap(last, other);
            }
        }
        self.turns.pop()
    }

    /// Asks living neighbours to probe suspects.
    fn ask(&mut self, actions: &mut Vec<Action>) {
        let suspect = |p: &&Peer| p.state == State::Suspect;
        let mut suspects: Vec<u16> = self.peers.iter().filter(suspect).map(|p| p.node).collect();
        for _ in 0..suspects.len().min(MAX_ASKED) {
            let at = (self.random() % suspects.len() as u64) as usize;
            let node = suspects.swap_remove(at);
            let first = self.random() as usize;
            let mut living: Vec<&mut Established> = self
                .peers
                .iter_mut()
                .filter(|p| p.neighbour && p.state == State::Alive)
                .filter_map(|p| p.link.as_mut())
                .collect();
            let count = living.len();
            living.rotate_left(first.checked_rem(count).unwrap_or(0));
            for link in living.into_iter().take(ASKED) {
                actions.push(link.send(Body::Probe(node)));
            }
        }
    }
}
