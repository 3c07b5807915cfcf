//! The CUDA kernels alone, timed by the device's own events: `cargo bench --features cuda --bench device`.
//!
//! Each answer is checked first, and the cache is flushed before each launch. Throughput is in bytes that must move.
//! Without a device this says so and ends.

use criterion::{Criterion, Throughput};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, sys};
use half::bf16;
use std::cell::{Cell, RefCell};
use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;
use tsugi_kpool::cuda::lora::{self, Mask};
use tsugi_kpool::cuda::{Launch, Machine, buffer, driver};
use tsugi_kpool::error::{Error, Result};
use tsugi_kpool::ops::{lora_expand, lora_shrink};
use tsugi_kpool::tensor::{DenseProduct, Device, Element, Mat, MatMut, TensorMut, TensorRef};

/// A layer of Llama-3-8B with two adapters of r 16.
const TOKENS: usize = 8192;
const FEATURES: usize = 4096;
const R: usize = 16;
const K: usize = 2;
/// One adapter of r 16 on its q and v projections, a slot of the elastic buffer.
const NUMEL: usize = 13_600_000;
const WINDOW: usize = 8;

const HERE: Device = Device::Cuda(0);

/// Launches on one stream, with scratch memory that is handed out again at each call.
struct Gpu {
    stream: Arc<CudaStream>,
    scratch: RefCell<CudaSlice<u8>>,
    used: Cell<usize>,
    flush: RefCell<CudaSlice<u8>>,
}

impl Machine for Gpu {
    unsafe fn launch(&self, op: &'static str, launch: &Launch<'_>) -> Result<()> {
        // SAFETY: the caller's promise; the stream is one of device 0.
        unsafe { driver::launch(op, 0, self.stream.cu_stream().cast::<c_void>(), launch) }
    }

    fn scratch(&self, _op: &'static str, bytes: usize) -> Result<*mut c_void> {
        let at = self
            .used
            .replace(self.used.get() + bytes.next_multiple_of(256));
        assert!(
            self.used.get() <= self.scratch.borrow().len(),
            "scratch is too small"
        );
        Ok(
            (address_mut(&mut self.scratch.borrow_mut(), &self.stream) as usize + at)
                as *mut c_void,
        )
    }

    fn processors(&self) -> usize {
        driver::processors("bench", 0).unwrap()
    }

    fn dense_product(&self, op: &'static str, _: &DenseProduct) -> Result<()> {
        Err(Error::Internal {
            op,
            what: "the dense product is torch's; benches/gpu.py times whole layers".into(),
        })
    }
}

impl Gpu {
    fn new() -> Option<Self> {
        // SAFETY: looks the driver's library up, nothing more.
        if !unsafe { sys::is_culib_present() } {
            return None;
        }
        let context = CudaContext::new(0).ok()?;
        println!("on {}", context.name().unwrap_or_default());
        let stream = context.default_stream();
        Some(Gpu {
            scratch: RefCell::new(stream.alloc_zeros(1 << 28).ok()?),
            flush: RefCell::new(stream.alloc_zeros(1 << 28).ok()?),
            used: Cell::new(0),
            stream,
        })
    }

    fn upload<E: Element + cudarc::driver::DeviceRepr>(&self, data: &[E]) -> CudaSlice<E> {
        self.stream.clone_htod(data).unwrap()
    }

    fn download<E: Element + cudarc::driver::DeviceRepr>(&self, data: &CudaSlice<E>) -> Vec<E> {
        self.stream.clone_dtoh(data).unwrap()
    }

    fn run(&self, call: impl Fn() -> Result<()>) {
        self.used.set(0);
        call().unwrap();
    }

    /// The time between two events around `call`, over a flushed cache.
    fn time(&self, count: u64, call: impl Fn() -> Result<()>) -> Duration {
        let context = self.stream.context();
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let mut total = Duration::ZERO;
        for _ in 0..count {
            self.stream
                .memset_zeros(&mut *self.flush.borrow_mut())
                .unwrap();
            let (begin, end) = (
                context.new_event(flags).unwrap(),
                context.new_event(flags).unwrap(),
            );
            begin.record(&self.stream).unwrap();
            self.run(&call);
            end.record(&self.stream).unwrap();
            end.synchronize().unwrap();
            total += Duration::from_secs_f64(f64::from(begin.elapsed_ms(&end).unwrap()) / 1e3);
        }
        total
    }
}

fn address<E>(slice: &CudaSlice<E>, stream: &CudaStream) -> *const E {
    slice.device_ptr(stream).0 as *const E
}

fn address_mut<E>(slice: &mut CudaSlice<E>, stream: &CudaStream) -> *mut E {
    slice.device_ptr_mut(stream).0 as *mut E
}

fn view<'a, E: Element>(data: *const E, sizes: &'a [i64], strides: &'a [i64]) -> TensorRef<'a> {
    // SAFETY: the callers pass device memory of this shape that outlives the benchmark.
    unsafe { TensorRef::new(data.cast(), sizes, strides, E::DTYPE, HERE) }
}

fn view_mut<'a, E: Element>(data: *mut E, sizes: &'a [i64], strides: &'a [i64]) -> TensorMut<'a> {
    // SAFETY: as above, and launches on one stream do not overlap.
    unsafe { TensorMut::new(data.cast(), sizes, strides, E::DTYPE, HERE) }
}

fn noise(count: usize, seed: usize) -> Vec<bf16> {
    (0..count)
        .map(|i| bf16::from_f64(((i * 7919 + seed * 104_729) as f64 * 0.618).sin()))
        .collect()
}

fn close(actual: f64, expected: f64, what: &str) {
    assert!(
        (actual - expected).abs() <= 2e-2 * expected.abs().max(1.0),
        "{what}: {actual}, expected {expected}"
    );
}

fn lora(criterion: &mut Criterion, gpu: &Gpu) {
    let (m, i, r) = (TOKENS as i64, FEATURES as i64, R as i64);
    let total = K * R;
    let host_x = noise(TOKENS * FEATURES, 0);
    let host_a: Vec<Vec<bf16>> = (0..K).map(|k| noise(R * FEATURES, k + 1)).collect();
    let x = gpu.upload(&host_x);
    let a: Vec<_> = host_a.iter().map(|a| gpu.upload(a)).collect();
    let b: Vec<_> = (0..K)
        .map(|k| gpu.upload(&noise(FEATURES * R, k + 9)))
        .collect();
    let mut h = gpu.upload(&vec![bf16::ZERO; TOKENS * total]);
    let mut y = gpu.upload(&vec![bf16::ZERO; TOKENS * FEATURES]);
    let (x_sizes, x_strides) = ([m, i], [i, 1]);
    let (a_sizes, b_sizes, b_strides) = ([r, i], [i, r], [r, 1]);
    let x_view = view(address(&x, &gpu.stream), &x_sizes, &x_strides);
    let a_views: Vec<_> = a
        .iter()
        .map(|a| view(address(a, &gpu.stream), &a_sizes, &x_strides))
        .collect();
    let b_views: Vec<_> = b
        .iter()
        .map(|b| view(address(b, &gpu.stream), &b_sizes, &b_strides))
        .collect();
    let shrink = lora_shrink::check(&x_view, &a_views, 0.0, None).unwrap();
    let h_data = address_mut(&mut h, &gpu.stream);
    // SAFETY: H has TOKENS x total elements.
    let h_mat = || unsafe { MatMut::from_raw(h_data, TOKENS, total, total as isize, 1) };
    let run_shrink = || lora::lora_shrink(gpu, &shrink, Mask::new(0.0, std::ptr::null()), h_mat());
    gpu.run(run_shrink);
    let got = gpu.download(&h);
    for (row, column) in [(0, 0), (17, 20), (TOKENS - 1, total - 1)] {
        let expected: f64 = (0..FEATURES)
            .map(|f| {
                host_x[row * FEATURES + f].to_f64()
                    * host_a[column / R][column % R * FEATURES + f].to_f64()
            })
            .sum();
        close(got[row * total + column].to_f64(), expected, "lora_shrink");
    }

    let h_sizes = [m, total as i64];
    let h_strides = [total as i64, 1];
    let h_view = view(h_data.cast_const(), &h_sizes, &h_strides);
    let y_data = address_mut(&mut y, &gpu.stream);
    let expand = lora_expand::check(
        &view(y_data.cast_const(), &x_sizes, &x_strides),
        &h_view,
        &b_views,
        &[0.5; K],
    )
    .unwrap();
    // SAFETY: Y has TOKENS x FEATURES elements.
    let y_mat = || unsafe { MatMut::from_raw(y_data, TOKENS, FEATURES, FEATURES as isize, 1) };
    let run_expand = || lora::lora_expand(gpu, &expand, y_mat());
    gpu.run(run_expand);
    let (h_host, y_host) = (got, gpu.download(&y));
    for (row, column) in [(0, 0), (33, 70), (TOKENS - 1, FEATURES - 1)] {
        let expected: f64 = (0..total)
            .map(|c| {
                let b = noise(FEATURES * R, c / R + 9);
                0.5 * h_host[row * total + c].to_f64() * b[column * R + c % R].to_f64()
            })
            .sum();
        close(
            y_host[row * FEATURES + column].to_f64(),
            expected,
            "lora_expand_",
        );
    }

    let mut group = criterion.benchmark_group("device");
    let bytes = |elements: usize| Throughput::Bytes(2 * elements as u64);
    group.throughput(bytes(TOKENS * FEATURES + total * FEATURES + TOKENS * total));
    group.bench_function("lora_shrink bf16", |b| {
        b.iter_custom(|n| gpu.time(n, run_shrink))
    });
    group.throughput(bytes(
        2 * TOKENS * FEATURES + total * FEATURES + TOKENS * total,
    ));
    group.bench_function("lora_expand_ bf16", |b| {
        b.iter_custom(|n| gpu.time(n, run_expand))
    });
    group.finish();
}

fn elastic_buffer(criterion: &mut Criterion, gpu: &Gpu) {
    let sizes = [NUMEL as i64];
    let host = noise(NUMEL, 3);
    let grad = gpu.upload(&host);
    let mut sum = gpu.upload(&vec![0.0f32; NUMEL]);
    let mut stats = gpu.upload(&[0.0f64; 8]);
    let grads = [view(address(&grad, &gpu.stream), &sizes, &[1])];
    let sums = [view_mut(address_mut(&mut sum, &gpu.stream), &sizes, &[1])];
    let scalars = view_mut(address_mut(&mut stats, &gpu.stream), &[8], &[1]);
    let accumulate = || buffer::accumulate(gpu, &sums, &scalars, &grads, 2.0, false);
    gpu.run(accumulate);
    gpu.run(accumulate);
    let (got, counted) = (gpu.download(&sum), gpu.download(&stats));
    assert_eq!(counted[0], 2.0, "snapshots");
    for at in [0, 12_345, NUMEL - 1] {
        close(
            f64::from(got[at]),
            4.0 * host[at].to_f64(),
            "sideband_accumulate_",
        );
    }

    let host_ring = noise(WINDOW * NUMEL, 5);
    let ring = gpu.upload(&host_ring);
    let mut out = gpu.upload(&[0.0f64]);
    let out_data = address_mut(&mut out, &gpu.stream);
    // SAFETY: the ring has WINDOW x NUMEL elements.
    let ring_mat = unsafe {
        Mat::from_raw(
            address(&ring, &gpu.stream),
            WINDOW,
            NUMEL,
            NUMEL as isize,
            1,
        )
    };
    let variance = || buffer::variance(gpu, ring_mat, WINDOW, out_data.cast());
    gpu.run(variance);
    let expected: f64 = (0..NUMEL)
        .map(|at| {
            let slots = (0..WINDOW).map(|slot| host_ring[slot * NUMEL + at].to_f64());
            let (sum, squares) = slots.fold((0.0, 0.0), |(s, q), v| (s + v, q + v * v));
            (squares - sum * sum / WINDOW as f64) / (WINDOW - 1) as f64
        })
        .sum();
    close(
        gpu.download(&out)[0],
        expected / NUMEL as f64,
        "buffer_variance",
    );

    let mut group = criterion.benchmark_group("device");
    group.throughput(Throughput::Bytes((2 + 4 + 4 + 2) * NUMEL as u64));
    group.bench_function("sideband_accumulate_ bf16", |b| {
        b.iter_custom(|n| gpu.time(n, accumulate))
    });
    group.throughput(Throughput::Bytes((2 * WINDOW * NUMEL) as u64));
    group.bench_function("buffer_variance bf16", |b| {
        b.iter_custom(|n| gpu.time(n, variance))
    });
    group.finish();
}

fn main() {
    let Some(gpu) = Gpu::new() else {
        println!("no CUDA device: the kernels' benchmark has nothing to run on");
        return;
    };
    let mut criterion = Criterion::default().configure_from_args();
    lora(&mut criterion, &gpu);
    elastic_buffer(&mut criterion, &gpu);
    criterion.final_summary();
}
