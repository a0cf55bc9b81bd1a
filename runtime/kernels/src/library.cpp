// What the library exports: the operators, and for which instruction set they are.
//
// Registered under onnxruntime's own names, they take the place of onnxruntime's in the sessions that they are given to, so that
// graphs are the same with them and without.
#include <cstdlib>

#include "operators.h"

#if defined(_WIN32)
#define EDGELORA_EXPORT extern "C" __declspec(dllexport)
#else
#define EDGELORA_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Which kernels this machine gets; null where there are none for it, and then the library must not be registered.
EDGELORA_EXPORT const char* edgelora_kernels() {
  const edgelora::Kernels* kernels = edgelora::find_kernels();
  return kernels ? kernels->name : nullptr;
}

// onnxruntime's entry point (SessionOptions.register_custom_ops_library).
EDGELORA_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const edgelora::ApiBase* base) {
  using namespace edgelora;
  const void* functions = base->get_api(kApiVersion);
  if (functions == nullptr) std::abort();  // older than 1.17: there is no way to say so
  const Api api(functions);
  if (find_kernels() == nullptr) return api.error(kFail, "edgelora has no kernels for this machine's instruction set");
  return guard(api, [&] {
    OrtCustomOpDomain* domain = nullptr;  // never released: sessions made of these options go on using it
    check(api.make_domain("com.microsoft", &domain));
    check(api.add_operator(domain, &matmul_nbits()));
    check(api.add_operator(domain, &group_query_attention()));
    check(api.add_domain(options, domain));
    OrtCustomOpDomain* own = nullptr;
    check(api.make_domain("edgelora", &own));
    for (const CustomOp& described : add_low_rank()) check(api.add_operator(own, &described));
    check(api.add_domain(options, own));
  });
}
