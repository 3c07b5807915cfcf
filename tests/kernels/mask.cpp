// Prints the dropout mask that the kernels draw: `mask SEED OFFSET THRESHOLD ADAPTERS ROWS COLUMNS`, one line a row.
#include "harness.h"

int main(int argc, char** argv) {
  if (argc != 7) {
    fprintf(stderr, "usage: mask SEED OFFSET THRESHOLD ADAPTERS ROWS COLUMNS\n");
    return 2;
  }
  const long long rng[2] = {strtoll(argv[1], nullptr, 10), strtoll(argv[2], nullptr, 10)};
  const unsigned threshold = static_cast<unsigned>(atoi(argv[3]));
  const int adapters = atoi(argv[4]), rows = atoi(argv[5]), columns = atoi(argv[6]);
  const unsigned groups = harness::tiles(columns, 8);
  std::vector<uint32_t> bits(groups);
  for (int k = 0; k < adapters; ++k) {
    for (int row = 0; row < rows; ++row) {
      const std::string fault = simt::launch({1}, {groups}, 0, 0, [&] {
        const tsugi::DropoutState drop(tsugi::Dropout{rng, 1.0, threshold});
        bits[threadIdx.x] = drop.keep(k, row, threadIdx.x);
      });
      if (!fault.empty()) return 1;
      for (int c = 0; c < columns; ++c) putchar(bits[static_cast<size_t>(c / 8)] >> (c % 8) & 1 ? '1' : '0');
      putchar('\n');
    }
  }
  return 0;
}
