//! The low-rank products alone, without Python: `cargo bench --bench products`.
//!
//! Throughput is in multiply-adds' floating-point operations (2 M I R). Each answer is checked first.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::hint::black_box;
use tsugi_kpool::cpu::gemm::{Axis, Out, Parts, Plain, gemm};
use tsugi_kpool::philox::Dropout;
use tsugi_kpool::tensor::{Element, Mat, MatMut};

const TOKENS: usize = 1024;
const FEATURES: usize = 2048;
const R: usize = 16;

struct Matrix<E> {
    data: Vec<E>,
    rows: usize,
    cols: usize,
}

impl<E: Element> Matrix<E> {
    fn random(rng: &mut StdRng, rows: usize, cols: usize, convert: impl Fn(f32) -> E) -> Self {
        let data = (0..rows * cols)
            .map(|_| convert(rng.random_range(-1.0..1.0)))
            .collect();
        Matrix { data, rows, cols }
    }
    fn view(&self) -> Mat {
        // SAFETY: the vector has rows x cols elements and outlives the views made in this file.
        unsafe {
            Mat::from_raw(
                self.data.as_ptr(),
                self.rows,
                self.cols,
                self.cols as isize,
                1,
            )
        }
    }
    fn view_mut(&mut self) -> MatMut {
        // SAFETY: as above, and one such view is used at a time.
        unsafe {
            MatMut::from_raw(
                self.data.as_mut_ptr(),
                self.rows,
                self.cols,
                self.cols as isize,
                1,
            )
        }
    }
}

fn products(criterion: &mut Criterion) {
    let mut rng = StdRng::seed_from_u64(0);
    let mut group = criterion.benchmark_group("products");
    for k in [1, 2, 4, 8] {
        let r = k * R;
        let x = Matrix::random(&mut rng, TOKENS, FEATURES, |v| v);
        let low = Matrix::random(&mut rng, TOKENS, FEATURES, half::bf16::from_f32);
        let a: Vec<_> = (0..k)
            .map(|_| Matrix::random(&mut rng, R, FEATURES, |v| v))
            .collect();
        let mut h = Matrix::random(&mut rng, TOKENS, r, |v| v);
        let mut y = Matrix::random(&mut rng, TOKENS, FEATURES, |v| v);
        let mut da = Matrix::random(&mut rng, r, FEATURES, |v| v);
        let a_t = || Parts::stacked(Axis::Columns, a.iter().map(|a| (a.view().t(), 1.0)));
        group.throughput(Throughput::Elements((2 * TOKENS * FEATURES * r) as u64));

        let shrink = |x: Mat, dropout: Option<Dropout>, h: &mut Matrix<f32>| {
            let out = Out::one(h.view_mut(), false);
            gemm::<f32>("bench", &Plain::with_dropout(x, dropout), &a_t(), &out)
        };
        shrink(x.view(), None, &mut h).unwrap();
        let expected: f64 = (0..FEATURES)
            .map(|i| f64::from(x.data[i]) * f64::from(a[0].data[i]))
            .sum();
        assert!((f64::from(h.data[0]) - expected).abs() < 1e-2);

        group.bench_function(BenchmarkId::new("shrink f32", k), |b| {
            b.iter(|| shrink(black_box(x.view()), None, &mut h));
        });
        group.bench_function(BenchmarkId::new("shrink bf16", k), |b| {
            b.iter(|| shrink(black_box(low.view()), None, &mut h));
        });
        group.bench_function(BenchmarkId::new("shrink f32 dropout", k), |b| {
            let dropout = Dropout::new(0.1, [1, 2], 0);
            b.iter(|| shrink(black_box(x.view()), dropout, &mut h));
        });
        group.bench_function(BenchmarkId::new("expand f32", k), |b| {
            b.iter(|| {
                let rows = Parts::stacked(Axis::Rows, a.iter().map(|a| (a.view(), 0.5)));
                let out = Out::one(y.view_mut(), true);
                gemm::<f32>("bench", &Plain::new(h.view()), &rows, &out)
            });
        });
        group.bench_function(BenchmarkId::new("weight gradient f32", k), |b| {
            b.iter(|| {
                let out = Out::one(da.view_mut(), false);
                let left = Plain::new(h.view().t());
                gemm::<f32>("bench", &left, &Parts::one(x.view(), 1.0), &out)
            });
        });
    }
    group.finish();
}

criterion_group!(benches, products);
criterion_main!(benches);
