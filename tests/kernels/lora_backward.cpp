// Executor tests of lora_dy_pass, lora_x_pass and the gradient of X.
#include "lora_test.h"

int main() {
  using namespace harness;
  each_dtype<DyPass>();
  each_dtype<XPass>();
  each_dtype<Dx>();
  return finish("lora backward");
}
