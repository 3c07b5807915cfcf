//! What is reported of the peers: state, suspicion, and how far they are from this node in phase.

use super::MS;
use super::frame::NO_STEP;
use super::peer::{Boundary, Peer, State};
use super::table::Table;
use std::collections::VecDeque;

/// What is known of one peer; times in ms, NaN where nothing is known.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct View {
    pub node: u16,
    pub state: State,
    pub boot: u64,
    pub silence_ms: f64,
    /// Suspicion, by which a living node becomes suspect: above [`PHI_SUSPECT`](super::peer::PHI_SUSPECT). NaN before the first sign of life.
    pub phi: f64,
    /// Last step the peer reported, [`NO_STEP`] if none, and our last step minus it.
    pub step: i64,
    pub lag: i64,
    /// When the peer reached the latest step that both reached, minus when we did; while one of the two is overdue at the
    /// next step, at least how late it is. Positive: the peer is behind. True to within `bound_ms`. Stated for the living
    /// alone: what a suspect said last is old, and a suspect must not hold anybody.
    pub drift_ms: f64,
    pub bound_ms: f64,
    pub offset_ms: f64,
    pub skew_ppm: f64,
    pub step_ms: f64,
    pub fill: f32,
    pub fires: u32,
    pub holds: u32,
}

impl Table {
    /// What is known of every peer, in order of node.
    pub fn views(&self, now: i64) -> Vec<View> {
        self.peers.iter().map(|peer| self.view(now, peer)).collect()
    }

    fn view(&self, now: i64, peer: &Peer) -> View {
        let own = self.last.map_or(NO_STEP, |m| m.step);
        let (drift, bound) = self
            .drift(now, peer)
            .filter(|_| peer.state == State::Alive)
            .unwrap_or((f64::NAN, f64::NAN));
        let silence = now - peer.heard;
        let ms = MS as f64;
        View {
            node: peer.node,
            state: peer.state,
            boot: peer.boot,
            silence_ms: silence as f64 / ms,
            phi: match peer.state {
                State::Unknown => f64::NAN,
                _ => peer.phi(now, self.settings.heartbeat),
            },
            step: peer.step,
            lag: if peer.step == NO_STEP || own == NO_STEP {
                0
            } else {
                own - peer.step
            },
            drift_ms: drift / ms,
            bound_ms: bound / ms,
            offset_ms: peer.clock.offset(now).map_or(f64::NAN, |o| o.0 / ms),
            skew_ppm: peer.clock.skew() * 1e6,
            step_ms: peer.last.map_or(f64::NAN, |h| h.step_ns as f64 / ms),
            fill: peer.last.map_or(f32::NAN, |h| h.fill),
            fires: peer.last.map_or(0, |h| h.fires),
            holds: peer.last.map_or(0, |h| h.holds),
        }
    }

    /// Drift and its bound in ns; the definition is at [`View::drift_ms`].
    fn drift(&self, now: i64, peer: &Peer) -> Option<(f64, f64)> {
        if !peer.neighbour {
            return None; // probed now and then, which is not often enough for phase
        }
        let (own_step, last) = (self.last?.step, peer.last?);
        let common = peer.marks.iter().rev().find_map(|mark| {
            let here = self
                .marks
                .binary_search_by_key(&mark.step, |m| m.step)
                .ok()
                .and_then(|i| self.marks.get(i))?;
            let (there, bound) = peer.clock.to_local(mark.at)?;
            Some((there - here.at as f64, bound))
        });
        let after =
            |marks: &VecDeque<Boundary>, step| marks.iter().find(|m| m.step > step).copied();
        let overdue = if own_step > last.step {
            let (seen, bound) = peer.clock.to_local(last.sent)?;
            after(&self.marks, last.step)
                .map(|m| (seen - m.at as f64, bound))
                .filter(|late| late.0 > 0.0)
        } else {
            after(&peer.marks, own_step)
                .and_then(|m| peer.clock.to_local(m.at))
                .map(|(at, b)| (at - now as f64, b))
                .filter(|late| late.0 < 0.0)
        };
        match (common, overdue) {
            (Some(c), Some(o)) if own_step > last.step => Some(if o.0 > c.0 { o } else { c }),
            (Some(c), Some(o)) => Some(if o.0 < c.0 { o } else { c }),
            (one, other) => one.or(other),
        }
    }
}
