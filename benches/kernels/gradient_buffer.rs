//! The gradient buffer's passes alone, in bytes that must move: `cargo bench --bench gradient_buffer`.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tsugi_kpool::ops::{buffer_variance, sideband_accumulate, sideband_drain, sideband_stats};
use tsugi_kpool::tensor::{DType, Device, TensorMut, TensorRef};

const NUMEL: usize = 1_000_000;
const WINDOW: usize = 32;

fn view<'a>(data: &'a [f32], sizes: &'a [i64], strides: &'a [i64]) -> TensorRef<'a> {
    // SAFETY: contiguous data of this shape, borrowed for the view's lifetime.
    unsafe {
        TensorRef::new(
            data.as_ptr().cast(),
            sizes,
            strides,
            DType::F32,
            Device::Cpu,
        )
    }
}

fn view_mut<'a>(data: *mut u8, sizes: &'a [i64], dtype: DType) -> TensorMut<'a> {
    // SAFETY: the callers pass a live, contiguous vector that nothing else uses meanwhile.
    unsafe { TensorMut::new(data, sizes, &[1], dtype, Device::Cpu) }
}

fn buffer(criterion: &mut Criterion) {
    let sizes = [NUMEL as i64];
    let grad: Vec<f32> = (0..NUMEL).map(|i| (i as f32 * 0.37).sin()).collect();
    let (mut sum, mut out, mut stats) = (vec![0.0f32; NUMEL], vec![0.0f32; NUMEL], [0.0f64; 8]);
    let g = view(&grad, &sizes, &[1]);

    let add = |sum: &mut [f32], stats: &mut [f64; 8]| {
        let mut sums = [view_mut(sum.as_mut_ptr().cast(), &sizes, DType::F32)];
        let mut stats = view_mut(stats.as_mut_ptr().cast(), &[8], DType::F64);
        sideband_accumulate::run(&mut sums, &mut stats, &[g], 1.0).unwrap();
    };
    add(&mut sum, &mut stats);
    add(&mut sum, &mut stats);
    assert_eq!(stats[0], 2.0);
    let values = sideband_stats::run(&[view(&sum, &sizes, &[1])], &stats).unwrap();
    // Two equal snapshots have no variance but the rounding of ||S||^2.
    assert!(values[4] < 1e-6 * values[2], "{values:?}");

    let mut group = criterion.benchmark_group("buffer");
    group.throughput(Throughput::Bytes(12 * NUMEL as u64));
    group.bench_function("accumulate", |b| b.iter(|| add(&mut sum, &mut stats)));
    group.throughput(Throughput::Bytes(4 * NUMEL as u64));
    group.bench_function("stats", |b| {
        b.iter(|| sideband_stats::run(&[view(&sum, &sizes, &[1])], &stats).unwrap());
    });
    group.throughput(Throughput::Bytes(12 * NUMEL as u64));
    group.bench_function("drain", |b| {
        b.iter(|| {
            let mut sums = [view_mut(sum.as_mut_ptr().cast(), &sizes, DType::F32)];
            let mut grads = [view_mut(out.as_mut_ptr().cast(), &sizes, DType::F32)];
            let mut stats = view_mut(stats.as_mut_ptr().cast(), &[8], DType::F64);
            sideband_drain::run(&mut sums, &mut stats, &mut grads, 0.5).unwrap();
        });
    });

    let ring: Vec<f32> = (0..WINDOW)
        .flat_map(|t| grad.iter().map(move |g| g + t as f32))
        .collect();
    let (ring_sizes, ring_strides) = ([WINDOW as i64, NUMEL as i64], [NUMEL as i64, 1]);
    let ring =
        buffer_variance::check(&view(&ring, &ring_sizes, &ring_strides), WINDOW as i64).unwrap();
    // The slots differ by 0, 1, ..., 31, whose unbiased variance is 88.
    assert!((buffer_variance::run(ring, WINDOW).unwrap() - 88.0).abs() < 1e-3);
    group.throughput(Throughput::Bytes((4 * WINDOW * NUMEL) as u64));
    group.bench_function("variance", |b| {
        b.iter(|| buffer_variance::run(ring, WINDOW).unwrap())
    });
    group.finish();
}

criterion_group!(benches, buffer);
criterion_main!(benches);
