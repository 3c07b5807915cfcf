//! What of a tensor's memory an operation may touch: bounds, alignment, and which arguments share memory.
//!
//! Torch promises none of the three for every tensor that a caller can make: a storage can be freed or cut
//! under a view (`resize_(0)`), `frombuffer` gives odd addresses, `expand` and `as_strided` give elements that
//! share memory, and any two arguments may be views of one storage.

use crate::error::{Error, Result};
use crate::tensor::shape;

/// What the owner of a tensor says of it; nothing of it is believed before [`Facts::check`].
#[derive(Clone, Copy)]
pub struct Facts<'a> {
    pub name: &'a str,
    pub data: *const u8,
    pub sizes: &'a [i64],
    pub strides: &'a [i64],
    pub element_bytes: usize,
    /// Where the first element lies in the storage, in elements.
    pub storage_offset: i64,
    pub storage_bytes: i64,
}

impl Facts<'_> {
    /// Fails unless every element lies inside the storage.
    pub fn check(&self, op: &'static str) -> Result<()> {
        let refuse = |what: String| Err(Error::argument(op, format!("{} {what}", self.name)));
        let counted = self.sizes.iter().try_fold(1i64, |count, &size| {
            let size = (size >= 0).then_some(size.max(1))?;
            count.checked_mul(size)
        });
        if counted.is_none() || self.sizes.len() != self.strides.len() {
            return refuse(format!(
                "is {}: these sizes cannot be multiplied in 64 bits",
                shape(self.sizes)
            ));
        }
        if self.sizes.contains(&0) {
            return Ok(());
        }
        let (lowest, highest) = reach(self.sizes, self.strides);
        let offset = i128::from(self.storage_offset);
        let room = i128::from(self.storage_bytes) / self.element_bytes as i128;
        if offset + lowest < 0 || offset + highest >= room {
            return refuse(format!(
                "is {} with strides {:?} from element {} of its storage on, which has {} bytes only: the storage was freed or resized under it",
                shape(self.sizes),
                self.strides,
                self.storage_offset,
                self.storage_bytes
            ));
        }
        if self.data.is_null() {
            return refuse(format!("is {} without memory", shape(self.sizes)));
        }
        Ok(())
    }

    pub fn is_aligned(&self) -> bool {
        (self.data as usize).is_multiple_of(self.element_bytes)
    }

    /// Fails unless the first element, and with it all, can be read where they lie.
    pub fn check_alignment(&self, op: &'static str) -> Result<()> {
        if self.is_aligned() || self.sizes.contains(&0) {
            return Ok(());
        }
        Err(Error::argument(
            op,
            format!(
                "{} lies at an address that is no multiple of its elements' {} bytes; pass a clone() of it",
                self.name, self.element_bytes
            ),
        ))
    }
}

/// The strides themselves where they leave no holes and share nothing, in whatever order; else those of a contiguous
/// tensor of these sizes.
pub fn dense_strides(sizes: &[i64], strides: &[i64]) -> Vec<i64> {
    let mut dims: Vec<(i64, i64)> = strides.iter().copied().zip(sizes.iter().copied()).collect();
    dims.retain(|&(_, size)| size > 1);
    dims.sort_unstable();
    let mut step = 1i64;
    let is_dense = dims.iter().all(|&(stride, size)| {
        let fits = stride == step;
        step = step.saturating_mul(size);
        fits
    });
    if is_dense {
        return strides.to_vec();
    }
    let mut step = 1i64;
    let contiguous = sizes.iter().rev().map(|&size| {
        let stride = step;
        step = step.saturating_mul(size.max(1));
        stride
    });
    let mut contiguous: Vec<i64> = contiguous.collect();
    contiguous.reverse();
    contiguous
}

/// Visits every index of a shape with its offsets, in elements, under two sets of strides.
pub fn each_offset(
    sizes: &[i64],
    strides: (&[i64], &[i64]),
    at: (i64, i64),
    visit: &mut dyn FnMut(i64, i64),
) {
    let ((first, second), Some((&size, rest))) = (strides, sizes.split_first()) else {
        return visit(at.0, at.1);
    };
    let (Some((&step, first)), Some((&other, second))) =
        (first.split_first(), second.split_first())
    else {
        return;
    };
    for index in 0..size {
        let next = (at.0 + index * step, at.1 + index * other);
        each_offset(rest, (first, second), next, visit);
    }
}

/// Offsets of the lowest and the highest element from the first, in elements; no size is zero.
fn reach(sizes: &[i64], strides: &[i64]) -> (i128, i128) {
    let mut span = (0, 0);
    for (&size, &stride) in sizes.iter().zip(strides) {
        let last = i128::from(size - 1) * i128::from(stride);
        span = (span.0 + last.min(0), span.1 + last.max(0));
    }
    span
}

/// Fails where a written argument shares memory with itself or with any other argument.
///
/// All have passed [`Facts::check`]. Afterwards a view of a written argument is the only path to its memory.
pub fn check_written(op: &'static str, written: &[Facts<'_>], read: &[Facts<'_>]) -> Result<()> {
    for argument in written {
        if overlaps_itself(argument) {
            return Err(Error::argument(
                op,
                format!(
                    "{} is {} with strides {:?}: its elements share memory, so it cannot be written in place; pass a clone() of it",
                    argument.name,
                    shape(argument.sizes),
                    argument.strides
                ),
            ));
        }
    }
    let written = written.iter().map(|argument| (argument, true));
    let mut spans: Vec<Span<'_>> = written
        .chain(read.iter().map(|argument| (argument, false)))
        .filter_map(|(argument, is_written)| Span::of(argument, is_written))
        .collect();
    spans.sort_by_key(|span| span.start);
    for (index, first) in spans.iter().enumerate() {
        let later = spans.iter().skip(index + 1);
        for second in later.take_while(|second| second.start < first.end) {
            if (first.is_written || second.is_written) && overlap(first.argument, second.argument) {
                let (target, other) = if first.is_written {
                    (first, second)
                } else {
                    (second, first)
                };
                return Err(Error::argument(
                    op,
                    format!(
                        "{} is written but shares memory with {}; pass a clone() of one of them",
                        target.argument.name, other.argument.name
                    ),
                ));
            }
        }
    }
    Ok(())
}

/// The addresses from an argument's first byte to its last.
struct Span<'a> {
    start: i128,
    end: i128,
    is_written: bool,
    argument: &'a Facts<'a>,
}

impl<'a> Span<'a> {
    fn of(argument: &'a Facts<'a>, is_written: bool) -> Option<Self> {
        if argument.sizes.contains(&0) {
            return None;
        }
        let bytes = argument.element_bytes as i128;
        let (lowest, highest) = reach(argument.sizes, argument.strides);
        let first = argument.data as usize as i128;
        Some(Span {
            start: first + lowest * bytes,
            end: first + (highest + 1) * bytes,
            is_written,
            argument,
        })
    }
}

/// One summand `step * n` with `n` in `0..=most`.
#[derive(Clone, Copy)]
struct Term {
    step: i128,
    most: i128,
}

/// Whether two elements of a view are one.
fn overlaps_itself(view: &Facts<'_>) -> bool {
    if view.sizes.contains(&0) {
        return false;
    }
    let dims: Vec<Term> = view
        .sizes
        .iter()
        .zip(view.strides)
        .filter(|(size, _)| **size > 1)
        .map(|(&size, &stride)| Term {
            step: i128::from(stride).abs(),
            most: i128::from(size) - 1,
        })
        .collect();
    // Two indices i != j of one element differ first in some dimension d, where i_d - j_d = 1 + n say; in those after
    // it the difference is anything from -most to most, that is, n - most with n in 0..=2 most.
    dims.iter().enumerate().any(|(first, dim)| {
        let rest = dims.iter().skip(first + 1);
        let mut terms = vec![Term {
            step: dim.step,
            most: dim.most - 1,
        }];
        terms.extend(rest.clone().map(|term| Term {
            step: term.step,
            most: 2 * term.most,
        }));
        let offset: i128 = rest.map(|term| term.step * term.most).sum();
        can_sum_to(terms, offset - dim.step)
    })
}

/// Whether two views share a byte.
fn overlap(first: &Facts<'_>, second: &Facts<'_>) -> bool {
    // A byte of the first lies at its lowest address plus a sum of terms, one of the second likewise. With the second
    // one's terms counted down from its highest byte, both sides become one sum.
    let (low, terms) = bytes_of(first);
    let (other_low, other_terms) = bytes_of(second);
    let other_high: i128 = other_low + other_terms.iter().map(|t| t.step * t.most).sum::<i128>();
    can_sum_to([terms, other_terms].concat(), other_high - low)
}

/// The lowest address of a view that is not empty, and its bytes' distances from there as a sum.
fn bytes_of(view: &Facts<'_>) -> (i128, Vec<Term>) {
    let bytes = view.element_bytes as i128;
    let (lowest, _) = reach(view.sizes, view.strides);
    let mut terms = vec![Term {
        step: 1,
        most: bytes - 1,
    }];
    terms.extend(
        view.sizes
            .iter()
            .zip(view.strides)
            .map(|(&size, &stride)| Term {
                step: i128::from(stride).abs() * bytes,
                most: i128::from(size) - 1,
            }),
    );
    (view.data as usize as i128 + lowest * bytes, terms)
}

/// Steps that a search may take. Layouts that people have need a handful; a riddle that needs more counts as shared.
const SEARCH: usize = 20_000;

/// Whether the terms can add up to `target`: a bounded linear Diophantine equation, searched from the largest step
/// down, where what the smaller steps can still reach leaves few choices. (NumPy's `may_share_memory` works alike.)
fn can_sum_to(terms: Vec<Term>, target: i128) -> bool {
    let mut terms: Vec<Term> = terms
        .into_iter()
        .filter(|term| term.step != 0 && term.most > 0)
        .collect();
    terms.sort_by_key(|term| -term.step);
    terms.dedup_by(|next, kept| {
        let same = next.step == kept.step;
        if same {
            kept.most += next.most;
        }
        same
    });
    let mut steps = SEARCH;
    search(&terms, target, &mut steps)
}

fn search(terms: &[Term], target: i128, steps: &mut usize) -> bool {
    if target == 0 {
        return true;
    }
    let Some((term, smaller)) = terms.split_first() else {
        return false;
    };
    let reachable: i128 = smaller.iter().map(|t| t.step * t.most).sum();
    let divisor = terms
        .iter()
        .fold(0, |d, t| greatest_common_divisor(d, t.step));
    if target < 0 || target % divisor != 0 {
        return false;
    }
    // Rounded up: the smaller steps must be able to reach the rest.
    let least = ((target - reachable).max(0) + term.step - 1) / term.step;
    let most = term.most.min(target / term.step);
    for count in least..=most {
        if *steps == 0 {
            return true;
        }
        *steps -= 1;
        if search(smaller, target - count * term.step, steps) {
            return true;
        }
    }
    false
}

fn greatest_common_divisor(a: i128, b: i128) -> i128 {
    if b == 0 {
        a
    } else {
        greatest_common_divisor(b, a % b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn view<'a>(start: usize, sizes: &'a [i64], strides: &'a [i64], bytes: usize) -> Facts<'a> {
        Facts {
            name: "x",
            data: std::ptr::without_provenance(4096 + start),
            sizes,
            strides,
            element_bytes: bytes,
            storage_offset: 0,
            storage_bytes: 0,
        }
    }

    /// The addresses of all elements, one by one.
    fn elements(view: &Facts<'_>) -> Vec<i128> {
        let mut out = vec![view.data as usize as i128];
        for (&size, &stride) in view.sizes.iter().zip(view.strides) {
            let step = i128::from(stride) * view.element_bytes as i128;
            out = out
                .iter()
                .flat_map(|at| (0..size).map(move |i| at + i128::from(i) * step))
                .collect();
        }
        out
    }

    fn bytes(view: &Facts<'_>) -> HashSet<i128> {
        let width = view.element_bytes as i128;
        elements(view)
            .iter()
            .flat_map(|at| *at..*at + width)
            .collect()
    }

    proptest! {
        #[test]
        fn equals_counting_every_byte(
            first in prop::collection::vec((1i64..5, 0i64..12), 0..4),
            second in prop::collection::vec((1i64..5, 0i64..12), 0..4),
            starts in (0usize..40, 0usize..40),
            wide in (any::<bool>(), any::<bool>()),
        ) {
            let width = |wide| if wide { 8 } else { 2 };
            let (sizes, strides): (Vec<_>, Vec<_>) = first.into_iter().unzip();
            let (sizes2, strides2): (Vec<_>, Vec<_>) = second.into_iter().unzip();
            let a = view(starts.0 * 2, &sizes, &strides, width(wide.0));
            let b = view(starts.1 * 2, &sizes2, &strides2, width(wide.1));
            prop_assert_eq!(overlap(&a, &b), !bytes(&a).is_disjoint(&bytes(&b)));
            let all = elements(&a);
            let distinct: HashSet<_> = all.iter().collect();
            prop_assert_eq!(overlaps_itself(&a), distinct.len() < all.len());
        }
    }

    fn refused(written: &[(&str, Facts<'_>)], read: &[(&str, Facts<'_>)]) -> String {
        fn renamed<'a>(list: &[(&'a str, Facts<'a>)]) -> Vec<Facts<'a>> {
            list.iter()
                .map(|(name, facts)| Facts { name, ..*facts })
                .collect()
        }
        check_written("op", &renamed(written), &renamed(read))
            .err()
            .map_or(String::new(), |error| error.to_string())
    }

    #[test]
    fn columns_of_one_buffer_pass_and_the_same_columns_do_not() {
        // [1000, 64] float32, cut into columns 0..16, 16..64 and 8..24.
        let (narrow, wide, strides) = ([1000i64, 16], [1000i64, 48], [64i64, 1]);
        let left = view(0, &narrow, &strides, 4);
        let right = view(64, &wide, &strides, 4);
        let across = view(32, &narrow, &strides, 4);
        assert_eq!(refused(&[("a", left), ("b", right)], &[]), "");
        assert!(
            refused(&[("a", left)], &[("b", across)])
                .contains("a is written but shares memory with b")
        );
        assert!(refused(&[("a", left), ("b", left)], &[]).contains("shares memory"));
        assert_eq!(refused(&[("a", right)], &[("b", left), ("c", left)]), "");
    }

    #[test]
    fn elements_that_share_memory_are_not_written() {
        let sizes = [4i64, 5];
        for strides in [[0i64, 1], [3, 1], [1, 1], [5, 0]] {
            let y = view(0, &sizes, &strides, 4);
            assert!(refused(&[("y", y)], &[]).contains("its elements share memory"));
            assert_eq!(refused(&[], &[("y", y)]), "");
        }
        for strides in [[5i64, 1], [1, 4], [10, 2], [i64::MAX / 8, 1]] {
            assert_eq!(refused(&[("y", view(0, &sizes, &strides, 4))], &[]), "");
        }
    }

    fn facts<'a>(sizes: &'a [i64], strides: &'a [i64], offset: i64, bytes: i64) -> Facts<'a> {
        Facts {
            name: "x",
            data: std::ptr::without_provenance(4096),
            sizes,
            strides,
            element_bytes: 4,
            storage_offset: offset,
            storage_bytes: bytes,
        }
    }

    #[test]
    fn a_dense_layout_is_kept_and_any_other_becomes_contiguous() {
        let kept = |sizes: &[i64], strides: &[i64]| dense_strides(sizes, strides) == strides;
        // PEFT's B: weight [O, r * E] as [O, r, E], seen as [E, O, r].
        assert!(kept(&[4, 9, 3], &[1, 12, 4]));
        assert!(kept(&[4, 3, 7], &[21, 7, 1]) && kept(&[1, 3, 7], &[5, 7, 1]));
        assert_eq!(dense_strides(&[4, 3, 7], &[60, 20, 2]), [21, 7, 1]);
        assert_eq!(dense_strides(&[4, 3, 7], &[0, 0, 1]), [21, 7, 1]);
        assert_eq!(dense_strides(&[4, 4], &[1, 1]), [4, 1]);
    }

    #[test]
    fn an_element_outside_the_storage_is_refused() {
        let good = |f: Facts<'_>| f.check("op").is_ok();
        assert!(good(facts(&[5, 6], &[6, 1], 0, 120)));
        assert!(!good(facts(&[5, 6], &[6, 1], 0, 119)));
        assert!(!good(facts(&[5, 6], &[6, 1], 1, 120)));
        assert!(good(facts(&[5, 6], &[-6, 1], 24, 120)));
        assert!(!good(facts(&[5, 6], &[-6, 1], 23, 120)));
        assert!(!good(facts(&[2], &[i64::MAX], i64::MAX, i64::MAX)));
        assert!(good(facts(&[0, 1 << 40], &[1, 1], 1 << 40, 0)));
        assert!(!good(facts(&[0, 1 << 62, 1 << 62], &[1, 1, 1], 0, 0)));
        assert!(good(facts(&[1 << 40], &[0], 0, 4)));
        assert!(!good(facts(&[-1], &[1], 0, 400)));
        let odd = Facts {
            data: std::ptr::without_provenance(4097),
            ..facts(&[1], &[1], 0, 4)
        };
        assert!(odd.check("op").is_ok() && odd.check_alignment("op").is_err());
        let none = Facts {
            data: std::ptr::null(),
            ..facts(&[1], &[1], 0, 4)
        };
        assert!(!good(none));
    }
}
