// The kernels as a library: `simt_launch` runs one by name on the host executor, as a driver would on a device.
#include "buffer_variance.cu"
#include "lora_dy_pass.cu"
#include "lora_expand.cu"
#include "lora_experts.cu"
#include "lora_reduce.cu"
#include "lora_shrink.cu"
#include "lora_x_pass.cu"
#include "sideband_accumulate.cu"
#include "sideband_drain.cu"
#include "sideband_stats.cu"

#include <map>

namespace {

struct Entry {
  size_t params_bytes;
  std::function<void(const void*)> run;
};

template <class P>
Entry entry(void (*kernel)(P)) {
  using Params = std::remove_cv_t<P>;
  return {sizeof(Params), [kernel](const void* params) { kernel(*static_cast<const Params*>(params)); }};
}

#define NAMED(kernel) {#kernel, entry(kernel)}

const std::map<std::string, Entry>& kernels() {
  static const std::map<std::string, Entry> table = {
#define LOW_RANK(T, P, RT) NAMED(tsugi_lora_shrink_##T##_##P##_r##RT), NAMED(tsugi_lora_dy_pass_##T##_##P##_r##RT), NAMED(tsugi_lora_x_pass_##T##_##P##_r##RT),
      TSUGI_EACH_LOW_RANK(LOW_RANK)
#define EXPAND(T, P) NAMED(tsugi_lora_expand_##T##_##P), NAMED(tsugi_lora_dx_##T##_##P),
      EXPAND(bf16, bf16) EXPAND(f16, f16) EXPAND(bf16, f32) EXPAND(f16, f32) EXPAND(f32, f32) EXPAND(f64, f64)
#define EXPERTS(T, P) NAMED(tsugi_lora_experts_down_##T##_##P), NAMED(tsugi_lora_experts_up_##T##_##P), NAMED(tsugi_lora_experts_factors_##T##_##P),
      EXPERTS(bf16, bf16) EXPERTS(f16, f16) EXPERTS(bf16, f32) EXPERTS(f16, f32) EXPERTS(f32, f32) EXPERTS(f64, f64)
#define ONE(T) NAMED(tsugi_lora_reduce_##T), NAMED(tsugi_sideband_inspect_##T), NAMED(tsugi_sideband_accumulate_##T), NAMED(tsugi_sideband_drain_##T), NAMED(tsugi_buffer_variance_##T),
      ONE(bf16) ONE(f16) ONE(f32) ONE(f64)
      NAMED(tsugi_sideband_norm), NAMED(tsugi_sideband_finish), NAMED(tsugi_buffer_variance_finish)};
  return table;
}

}  // namespace

// Returns 0, or 1 with a sentence in `fault`.
extern "C" int simt_launch(const char* name, const unsigned* grid, unsigned threads, size_t shared, const void* params,
                           size_t params_bytes, int seed, char* fault, size_t fault_bytes) {
  std::string text;
  const auto found = kernels().find(name);
  if (found == kernels().end()) {
    text = std::string("no kernel is called ") + name;
  } else if (found->second.params_bytes != params_bytes) {
    text = std::string(name) + " takes " + std::to_string(found->second.params_bytes) + " bytes of parameters, not " + std::to_string(params_bytes);
  } else {
    text = simt::launch({grid[0], grid[1], grid[2]}, {threads}, shared, seed, [&] { found->second.run(params); });
  }
  snprintf(fault, fault_bytes, "%s", text.c_str());
  return text.empty() ? 0 : 1;
}
