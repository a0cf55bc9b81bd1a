// The library's exports: the operators, the name of their instruction set, and the number of their interface.
//
// They are registered under the names of onnxruntime's own operators and of functions of the graphs, and replace those in a
// session, so the graphs are the same with and without them.
#include <cstdlib>
#include <vector>

#include "operators.h"

#if defined(_WIN32)
#define EDGELORA_EXPORT extern "C" __declspec(dllexport)
#else
#define EDGELORA_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// The instruction set of this machine's kernels; null if none supports it. Then the library must not be registered.
EDGELORA_EXPORT const char* edgelora_kernels() {
  const edgelora::Kernels* kernels = edgelora::find_kernels();
  return kernels ? kernels->name : nullptr;
}

// The number of what graphs and the runtime may expect of the operators. It grows with each change of them.
EDGELORA_EXPORT int edgelora_kernels_interface() { return 2; }

namespace edgelora {
namespace {

// A domain is never freed, since sessions keep using it.
OrtCustomOpDomain* make_domain(const Api& api, const char* name, const std::vector<const CustomOp*>& operators) {
  OrtCustomOpDomain* domain = nullptr;
  check(api.make_domain(name, &domain));
  for (const CustomOp* described : operators) check(api.add_operator(domain, described));
  return domain;
}

void add_operators(const Api& api, OrtSessionOptions* options) {
  std::vector<const CustomOp*> own;
  for (const CustomOp& described : own_operators()) own.push_back(&described);
  static OrtCustomOpDomain* const theirs = make_domain(api, "com.microsoft", {&matmul_nbits(), &group_query_attention()});
  static OrtCustomOpDomain* const ours = make_domain(api, "edgelora", own);
  check(api.add_domain(options, theirs));
  check(api.add_domain(options, ours));
}

}  // namespace
}  // namespace edgelora

// onnxruntime's entry point (SessionOptions.register_custom_ops_library).
EDGELORA_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const edgelora::ApiBase* base) {
  const void* functions = base->get_api(edgelora::kApiVersion);
  if (functions == nullptr) std::abort();  // older than 1.17: there is no way to report it
  const edgelora::Api api(functions);
  if (edgelora::find_kernels() == nullptr)
    return api.error(edgelora::kFail, "edgelora's kernels do not support this machine's instruction set");
  return edgelora::guard(api, [&] { edgelora::add_operators(api, options); });
}
