// program EXTENSION MODEL TOKENS IN_FEATURES: a SMILE model without Python. Prints its output for x[t, d] = sin(t + d).
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>

int main(int, char** arguments) {
  if (!dlopen(arguments[1], RTLD_NOW)) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  const int64_t tokens = std::atoll(arguments[3]), in_features = std::atoll(arguments[4]);
  c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader model(arguments[2]);
  const at::Tensor x = at::sin(at::arange(tokens).unsqueeze(1) + at::arange(in_features));
  const at::Tensor y = model.run({x})[0].contiguous();
  for (int64_t i = 0; i < y.numel(); ++i) std::printf("%.9g\n", y.data_ptr<float>()[i]);
}
