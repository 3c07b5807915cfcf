//! Dropout masks from a counter: Philox4x32 with seven rounds.
//!
//! Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The mask is a
//! pure function of (seed, offset, adapter, row, column), so the backward pass draws the mask of the
//! forward pass again instead of storing it, and the CUDA kernels draw the same bits.
//!
//! counter = (column / 8, row mod 2^32, adapter | (offset >> 32 & 0xffff) << 16, offset mod 2^32),
//! key = seed. The four output words hold eight 16-bit draws, low half first; column c uses draw
//! c mod 8 and is kept if that draw is at least `threshold`.

const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Philox4x32 evaluations done side by side, so that they compile to vector code.
pub const LANES: usize = 8;
/// Columns that one evaluation serves.
pub const DRAWS: usize = 8;

/// `rounds` rounds of Philox4x32 on eight counters under one key.
#[inline(always)]
pub fn philox4x32(
    mut counter: [[u32; LANES]; 4],
    mut key: [u32; 2],
    rounds: usize,
) -> [[u32; LANES]; 4] {
    for round in 0..rounds {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let mut next = [[0u32; LANES]; 4];
        for lane in 0..LANES {
            let p0 = u64::from(counter[0][lane]) * u64::from(MULTIPLIER[0]);
            let p1 = u64::from(counter[2][lane]) * u64::from(MULTIPLIER[1]);
            next[0][lane] = (p1 >> 32) as u32 ^ counter[1][lane] ^ key[0];
            next[1][lane] = p1 as u32;
            next[2][lane] = (p0 >> 32) as u32 ^ counter[3][lane] ^ key[1];
            next[3][lane] = p0 as u32;
        }
        counter = next;
    }
    counter
}

/// Dropout of one adapter's input: which elements stay, and what they are multiplied by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    key: [u32; 2],
    adapter_word: u32,
    offset_word: u32,
    threshold: u32,
    /// 65536 / (65536 - threshold): the inverse of the exact keep probability.
    pub scale: f64,
}

/// A probability in units of 1/65536, the resolution of a draw.
pub fn threshold(p: f64) -> u32 {
    ((p * 65536.0 + 0.5).floor() as u32).min(65535)
}

impl Dropout {
    /// The mask of adapter number `adapter` of a call, or `None` where nothing is dropped.
    pub fn new(p: f64, rng: [i64; 2], adapter: usize) -> Option<Self> {
        let threshold = threshold(p);
        if threshold == 0 {
            return None;
        }
        let (seed, offset) = (rng[0] as u64, rng[1] as u64);
        Some(Dropout {
            key: [seed as u32, (seed >> 32) as u32],
            adapter_word: (adapter as u32 & 0xffff) | (((offset >> 32) as u32 & 0xffff) << 16),
            offset_word: offset as u32,
            threshold,
            scale: 65536.0 / (65536.0 - f64::from(threshold)),
        })
    }

    /// Draws for `LANES` groups of eight columns of one row: `out[8 * lane + j]`.
    #[inline(always)]
    pub fn draws_along_row(&self, row: usize, first_group: u32) -> [u16; LANES * DRAWS] {
        let mut groups = [0u32; LANES];
        for (lane, group) in groups.iter_mut().enumerate() {
            *group = first_group.wrapping_add(lane as u32);
        }
        Self::split(philox4x32(
            [
                groups,
                [row as u32; LANES],
                [self.adapter_word; LANES],
                [self.offset_word; LANES],
            ],
            self.key,
            7,
        ))
    }

    /// Draws for one group of eight columns of `LANES` consecutive rows: `out[8 * lane + j]`.
    #[inline(always)]
    pub fn draws_down_rows(&self, first_row: usize, group: u32) -> [u16; LANES * DRAWS] {
        let mut rows = [0u32; LANES];
        for (lane, row) in rows.iter_mut().enumerate() {
            *row = (first_row as u32).wrapping_add(lane as u32);
        }
        Self::split(philox4x32(
            [
                [group; LANES],
                rows,
                [self.adapter_word; LANES],
                [self.offset_word; LANES],
            ],
            self.key,
            7,
        ))
    }

    /// Lane-major order: the eight 16-bit draws of a lane stand side by side, low halves first.
    #[inline(always)]
    fn split(words: [[u32; LANES]; 4]) -> [u16; LANES * DRAWS] {
        let mut lanes = [[0u32; 4]; LANES];
        for (lane, out) in lanes.iter_mut().enumerate() {
            *out = [
                words[0][lane],
                words[1][lane],
                words[2][lane],
                words[3][lane],
            ];
        }
        let mut draws = [0u16; LANES * DRAWS];
        for (pair, word) in draws.chunks_exact_mut(2).zip(lanes.as_flattened()) {
            pair[0] = *word as u16;
            pair[1] = (*word >> 16) as u16;
        }
        draws
    }

    #[inline(always)]
    pub fn keeps(&self, draw: u16) -> bool {
        u32::from(draw) >= self.threshold
    }

    /// Calls `apply(i, factor)` for columns `start .. start + count` of a row, factor being 0 or the scale.
    #[inline(always)]
    pub fn for_row(
        &self,
        row: usize,
        start: usize,
        count: usize,
        mut apply: impl FnMut(usize, f64),
    ) {
        let end = start + count;
        let mut group = start / DRAWS;
        while group * DRAWS < end {
            let draws = self.draws_along_row(row, group as u32);
            let first = group * DRAWS;
            for (j, &draw) in draws.iter().enumerate() {
                let column = first + j;
                if column >= start && column < end {
                    apply(
                        column - start,
                        if self.keeps(draw) { self.scale } else { 0.0 },
                    );
                }
            }
            group += LANES;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Published known answers of Philox4x32-10 (Random123, kat_vectors).
    #[test]
    fn matches_the_published_vectors() {
        let cases: [([u32; 4], [u32; 2], [u32; 4]); 3] = [
            (
                [0; 4],
                [0; 2],
                [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            ),
            (
                [!0; 4],
                [!0; 2],
                [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            ),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            let out = philox4x32(counter.map(|word| [word; LANES]), key, 10);
            for lane in 0..LANES {
                assert_eq!(out.map(|word| word[lane]), expected);
            }
        }
    }

    #[test]
    fn both_orders_draw_the_same_bits() {
        let dropout = Dropout::new(0.3, [-5, 1 << 40], 3).unwrap();
        for row in 0..LANES {
            let along = dropout.draws_along_row(100 + row, 7);
            for lane in 0..LANES {
                let down = dropout.draws_down_rows(100, 7 + lane as u32);
                assert_eq!(along[8 * lane..8 * lane + 8], down[8 * row..8 * row + 8]);
            }
        }
    }

    #[test]
    fn any_start_column_sees_the_same_mask() {
        let dropout = Dropout::new(0.5, [1, 2], 0).unwrap();
        let mut whole = vec![-1.0; 200];
        dropout.for_row(9, 0, 200, |i, f| whole[i] = f);
        for start in [0, 1, 7, 8, 63, 64, 65, 130] {
            let mut part = vec![-1.0; 200 - start];
            dropout.for_row(9, start, 200 - start, |i, f| part[i] = f);
            assert_eq!(part, whole[start..]);
        }
    }

    #[test]
    fn keep_rate_is_unbiased_and_adapters_are_independent() {
        let p = 0.1;
        let (mut kept, mut both, mut sum, mut total) = (0usize, 0usize, 0.0, 0usize);
        let first = Dropout::new(p, [42, 0], 0).unwrap();
        let second = Dropout::new(p, [42, 0], 1).unwrap();
        for row in 0..512 {
            let (mut a, mut b) = ([0.0; 512], [0.0; 512]);
            first.for_row(row, 0, 512, |i, f| a[i] = f);
            second.for_row(row, 0, 512, |i, f| b[i] = f);
            for (x, y) in a.iter().zip(&b) {
                total += 1;
                kept += usize::from(*x > 0.0);
                both += usize::from(*x > 0.0 && *y > 0.0);
                sum += x;
            }
        }
        let n = total as f64;
        // Five standard deviations of a binomial proportion.
        let tolerance = |rate: f64| 5.0 * (rate * (1.0 - rate) / n).sqrt();
        assert!((kept as f64 / n - 0.9).abs() < tolerance(0.9) + 1e-5);
        assert!((both as f64 / n - 0.81).abs() < tolerance(0.81) + 2e-5);
        assert!((sum / n - 1.0).abs() < 0.01);
    }

    #[test]
    fn no_dropout_below_the_resolution() {
        assert!(Dropout::new(0.0, [0, 0], 0).is_none());
        assert!(Dropout::new(1e-6, [0, 0], 0).is_none());
        assert_eq!(threshold(0.999_999_9), 65535);
    }
}
