#include "registration.h"

#include <dlfcn.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

namespace lockin_fast {

bool asked_for(const char* op) {
  const char* list = std::getenv("LOCKIN_FAST_CUDA_OPS");
  return !list || ("," + std::string(list) + ",").find("," + std::string(op) + ",") != std::string::npos;
}

// Only a CUDA build of torch has this symbol, and this library is built against any: it is taken from the library that
// torch has loaded.
void* current_stream(int32_t device) {
  using CurrentStream = int32_t (*)(int32_t, void**);
  static const auto get = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<CurrentStream>(torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(get, "this torch is not built for CUDA: its library has no aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "torch has no current stream on CUDA device ", device);
  return stream;
}

}  // namespace lockin_fast
