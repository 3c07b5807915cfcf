// Executor tests of sideband_accumulate, sideband_drain, sideband_stats and buffer_variance.
#include "buffer_variance.cu"
#include "harness.h"
#include "sideband_accumulate.cu"
#include "sideband_drain.cu"
#include "sideband_stats.cu"

using namespace harness;
using namespace tsugi;

namespace {

constexpr unsigned BLOCKS = 3;  // fewer than the chunks, so that blocks take several

bool close(double got, double want, double tol) {
  return got == want || std::fabs(got - want) <= tol * std::fabs(want);
}

template <class T>
struct Adapter {
  std::vector<Matrix<T>> grad;
  std::vector<Matrix<float>> sum;
  Matrix<double> stats{1, 8};
  TensorTable table{};

  explicit Adapter(const std::vector<long long>& sizes, int shift) {
    stats.fill(0);
    for (long long n : sizes) {
      grad.emplace_back(1, n, 0, shift);
      sum.emplace_back(1, n, 0, shift);
      sum.back().fill(0);
    }
    table.count = static_cast<int>(sizes.size());
    for (size_t i = 0; i < sizes.size(); ++i) {
      table.sum[i] = sum[i].data;
      table.grad[i] = grad[i].data;
      table.numel[i] = sizes[i];
      table.first_chunk[i + 1] = table.first_chunk[i] + (sizes[i] + TABLE_CHUNK - 1) / TABLE_CHUNK;
    }
  }
  std::vector<Span> spans() {
    std::vector<Span> all{span(stats)};
    for (auto& m : grad) all.push_back(span(m));
    for (auto& m : sum) all.push_back(span(m));
    return all;
  }
  std::string accumulate(double weight, bool zero, int seed) {
    std::vector<double> squares(BLOCKS, std::numeric_limits<double>::quiet_NaN());
    std::vector<int> flags(BLOCKS, -1);
    AccumulateParams p{table, stats.data, squares.data(), flags.data(), static_cast<int>(BLOCKS), 0, weight, zero, 1};
    std::string fault = simt::launch({BLOCKS}, {TABLE_THREADS}, 0, seed, [&] { sideband_inspect<T>(p); });
    if (!fault.empty()) return fault;
    return simt::launch({BLOCKS + 1}, {TABLE_THREADS}, 0, seed, [&] { sideband_accumulate<T>(p); });
  }
};

template <class T>
void accumulate_and_drain(const std::vector<long long>& sizes, int shift) {
  Adapter<T> a(sizes, shift);
  const std::string what = std::string("buffer ") + name_of<T>() + " tensors=" + std::to_string(sizes.size()) + " shift=" + std::to_string(shift);
  const double weights[3] = {1.0, 2.5, 0.5};
  std::vector<std::vector<double>> want(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) want[i].assign(static_cast<size_t>(sizes[i]), 0.0);
  double q = 0, n = 0, n2 = 0, numel = 0;
  for (long long s : sizes) numel += static_cast<double>(s);
  for (int step = 0; step < 3; ++step) {
    for (size_t i = 0; i < sizes.size(); ++i) {
      a.grad[i].random();
      double squares = 0;
      for (long long e = 0; e < sizes[i]; ++e) {
        const double g = static_cast<float>(a.grad[i].value(0, e));
        squares += g * g;
        want[i][static_cast<size_t>(e)] += weights[step] * g;
      }
      q += weights[step] * squares;
    }
    n += weights[step];
    n2 += weights[step] * weights[step];
    run_orders(what, a.spans(), [&](int seed) { return a.accumulate(weights[step], step == 1, seed); });
    if (step == 1) {
      for (auto& m : a.grad) compare(m, [](long long, long long) { return 0.0; }, 0, what + " zero_grad");
    }
  }
  for (size_t i = 0; i < sizes.size(); ++i) {
    compare(a.sum[i], [&](long long, long long e) { return want[i][static_cast<size_t>(e)]; }, 1e-6, what + " S");
  }
  const double fields[5] = {3, n, n2, q, 0};
  for (int i = 0; i < 5; ++i) report(close(a.stats.data[i], fields[i], 1e-12), what + " stats[" + std::to_string(i) + "]");

  // A snapshot with one value that is not finite, in every tensor in turn.
  for (size_t i = 0; i < sizes.size() && i < 8; ++i) {
    if (sizes[i] == 0) continue;
    for (auto& m : a.grad) m.random();
    a.grad[i].at(0, sizes[i] - 1) = Element<T>::from(i % 2 ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN());
    const bool zero = i % 3 == 0;
    const double bad_before = a.stats.data[STATS_NONFINITE];
    run_orders(what + " not finite", a.spans(), [&](int seed) { return a.accumulate(1.0, zero, seed); });
    report(a.stats.data[STATS_NONFINITE] == bad_before + 1, what + " counts what is not finite");
    if (zero) {
      for (auto& m : a.grad) compare(m, [](long long, long long) { return 0.0; }, 0, what + " zero_grad, not finite");
    }
  }
  for (int i = 0; i < 4; ++i) report(close(a.stats.data[i], fields[i], 1e-12), what + " stats unchanged");
  double norm2 = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    compare(a.sum[i], [&](long long, long long e) { return want[i][static_cast<size_t>(e)]; }, 1e-6, what + " S unchanged");
    for (long long e = 0; e < sizes[i]; ++e) norm2 += a.sum[i].value(0, e) * a.sum[i].value(0, e);
  }

  Matrix<double> out(1, 8), norms(1, BLOCKS);
  run_orders(what + " stats", {span(out), span(norms)}, [&](int seed) {
    StatsParams p{a.table, norms.data, 0};
    std::string fault = simt::launch({BLOCKS}, {TABLE_THREADS}, 0, seed, [&] { sideband_norm(p); });
    if (!fault.empty()) return fault;
    StatsFinishParams f{a.stats.data, norms.data, static_cast<int>(BLOCKS), numel, out.data};
    return simt::launch({1}, {STATS_THREADS}, 0, seed, [&] { sideband_finish(f); });
  });
  const double variance = (q - norm2 / n) / (n - n2 / n);
  const double expect[8] = {3, n, q, norm2, variance, norm2 / (n * n), numel, a.stats.data[STATS_NONFINITE]};
  for (int i = 0; i < 8; ++i) report(close(out.data[i], expect[i], 1e-11), what + " sideband_stats[" + std::to_string(i) + "]");

  run_orders(what + " drain", a.spans(), [&](int seed) {
    DrainParams p{a.table, a.stats.data, 0.125};
    return simt::launch({BLOCKS}, {TABLE_THREADS}, 0, seed, [&] { sideband_drain<T>(p); });
  });
  for (size_t i = 0; i < sizes.size(); ++i) {
    compare(a.grad[i], [&](long long, long long e) { return 0.125 * want[i][static_cast<size_t>(e)]; }, tolerance<T>() + 1e-6, what + " drained");
    compare(a.sum[i], [](long long, long long) { return 0.0; }, 0, what + " S cleared");
  }
  for (int i = 0; i < 8; ++i) report(a.stats.data[i] == 0, what + " stats cleared");
}

// The signal is a thousand times the noise: V is a difference of numbers 1e6 times larger.
void statistic_of_a_strong_signal() {
  Adapter<float> a({5000}, 0);
  std::normal_distribution<double> normal(0.0, 1.0);
  std::vector<double> mean(5000, 0.0), m2(5000, 0.0);
  for (int step = 0; step < 4; ++step) {
    for (int e = 0; e < 5000; ++e) {
      a.grad[0].at(0, e) = static_cast<float>(1000.0 + normal(generator()));
      const double g = a.grad[0].value(0, e), d = g - mean[static_cast<size_t>(e)];
      mean[static_cast<size_t>(e)] += d / (step + 1);
      m2[static_cast<size_t>(e)] += d * (g - mean[static_cast<size_t>(e)]);
    }
    report(a.accumulate(1.0, false, 0).empty(), "strong signal");
  }
  double variance = 0;
  for (double v : m2) variance += v / 3;
  Matrix<double> out(1, 8), norms(1, BLOCKS);
  StatsParams p{a.table, norms.data, 0};
  StatsFinishParams f{a.stats.data, norms.data, static_cast<int>(BLOCKS), 5000, out.data};
  simt::launch({BLOCKS}, {TABLE_THREADS}, 0, 0, [&] { sideband_norm(p); });
  simt::launch({1}, {STATS_THREADS}, 0, 0, [&] { sideband_finish(f); });
  // S itself is fp32: its rounding, not the sums, bounds what V can be.
  report(close(out.data[4], variance, 2e-2), "V of a strong signal: " + std::to_string(out.data[4]) + " is not " + std::to_string(variance));
}

void statistic_of_little() {
  Adapter<float> a({3}, 0);
  Matrix<double> out(1, 8), norms(1, 1);
  for (int m = 0; m < 2; ++m) {
    StatsParams p{a.table, norms.data, 0};
    StatsFinishParams f{a.stats.data, norms.data, 1, 3, out.data};
    simt::launch({1}, {TABLE_THREADS}, 0, 0, [&] { sideband_norm(p); });
    simt::launch({1}, {STATS_THREADS}, 0, 0, [&] { sideband_finish(f); });
    report(std::isinf(out.data[4]) && out.data[4] > 0, "V of fewer than two snapshots");
    if (m == 0) report(out.data[5] == 0, "P of nothing");
    a.grad[0].random();
    a.accumulate(1.0, false, 0);
  }
}

// A sum that is no number must not look like one without variance.
void statistic_of_no_number() {
  Adapter<float> a({3}, 0);
  for (int m = 0; m < 2; ++m) {
    a.grad[0].random();
    a.accumulate(1.0, false, 0);
  }
  a.sum[0].at(0, 1) = std::nanf("");
  Matrix<double> out(1, 8), norms(1, 1);
  StatsParams p{a.table, norms.data, 0};
  StatsFinishParams f{a.stats.data, norms.data, 1, 3, out.data};
  simt::launch({1}, {TABLE_THREADS}, 0, 0, [&] { sideband_norm(p); });
  simt::launch({1}, {STATS_THREADS}, 0, 0, [&] { sideband_finish(f); });
  report(std::isnan(out.data[4]), "V of a sum with a NaN: " + std::to_string(out.data[4]));
}

template <class T>
void variance(int window, int filled, long long numel, int pad, int shift, double mean) {
  Matrix<T> ring(window, numel, pad, shift);
  std::normal_distribution<double> normal(mean, 1.0);
  for (long long s = 0; s < filled; ++s) {
    for (long long e = 0; e < numel; ++e) ring.at(s, e) = Element<T>::from(normal(generator()));
  }
  Matrix<double> out(1, 1), partial(1, BLOCKS);
  const std::string what = std::string("variance ") + name_of<T>() + " filled=" + std::to_string(filled) + " numel=" + std::to_string(numel) +
                           " mean=" + std::to_string(mean) + " shift=" + std::to_string(shift);
  run_orders(what, {span(out), span(partial)}, [&](int seed) {
    VarianceParams p{ring.data, numel, ring.stride, filled, partial.data};
    std::string fault = simt::launch({BLOCKS}, {VARIANCE_THREADS}, 0, seed, [&] { buffer_variance<T>(p); });
    if (!fault.empty()) return fault;
    VarianceFinishParams f{partial.data, static_cast<int>(BLOCKS), filled, static_cast<double>(numel), out.data};
    return simt::launch({1}, {VARIANCE_THREADS}, 0, seed, [&] { buffer_variance_finish(f); });
  });
  if (filled < 2) {
    report(std::isinf(out.data[0]) && out.data[0] > 0, what);
    return;
  }
  double total = 0;
  for (long long e = 0; e < numel; ++e) {
    double average = 0, spread = 0;
    for (long long s = 0; s < filled; ++s) average += ring.value(s, e) / filled;
    for (long long s = 0; s < filled; ++s) spread += (ring.value(s, e) - average) * (ring.value(s, e) - average);
    total += spread / (filled - 1);
  }
  const double want = total / static_cast<double>(numel);
  report(close(out.data[0], want, std::is_same_v<T, double> ? 1e-9 : 1e-5), what + ": " + std::to_string(out.data[0]) + " is not " + std::to_string(want));
}

template <class T>
void variances() {
  for (int shift : {0, 1}) {
    variance<T>(4, 4, 1, 0, shift, 0);
    variance<T>(3, 2, 127, 1, shift, 3);
    variance<T>(8, 5, 129, 3, shift, 0);
    variance<T>(6, 6, 7000, 0, shift, 1);
    variance<T>(4, 1, 129, 0, shift, 0);
  }
  variance<T>(32, 32, 200, 0, 0, std::is_same_v<T, f16> ? 200 : 1000);
}

}  // namespace

int main() {
  for (int shift : {0, 1}) {
    const std::vector<long long> sizes{1, 127, 0, 129, 4096, 9001, 8 * 256};
    accumulate_and_drain<bf16>(sizes, shift);
    accumulate_and_drain<f16>(sizes, shift);
    accumulate_and_drain<float>(sizes, shift);
    accumulate_and_drain<double>(sizes, shift);
  }
  accumulate_and_drain<bf16>(std::vector<long long>(TABLE_TENSORS, 9), 0);
  statistic_of_a_strong_signal();
  statistic_of_little();
  statistic_of_no_number();
  variances<bf16>();
  variances<f16>();
  variances<float>();
  variances<double>();
  return finish("buffer");
}
