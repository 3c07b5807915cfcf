// Executor tests of lora_shrink and lora_expand.
#include "lora_test.h"

int main() {
  using namespace harness;
  each_dtype<Shrink>();
  each_dtype<Expand>();
  return finish("lora forward");
}
