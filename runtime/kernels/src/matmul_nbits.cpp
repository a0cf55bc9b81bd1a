// com.microsoft.MatMulNBits: a product with a weight of 4 or 8 bits, without g_idx.
#include "prologues.h"

namespace edgelora {
namespace {

class MatMulNBits : NBitsProduct {
 public:
  enum Input : size_t { kGroups = kOwn, kBias, kInputs };

  MatMulNBits(const Api& api, const OrtKernelInfo* info, const Kernels& kernels)
      : NBitsProduct(api, info, "MatMulNBits", kernels) {
    if (constant(info, kGroups, kAnyType, 0)) refuse("g_idx is not supported");
    weights_.bias = static_cast<const float*>(constant(info, kBias, kFloat, static_cast<int64_t>(weights_.columns)));
  }

  void compute(OrtKernelContext* context) const {
    require_constant(context, kGroups, nullptr);
    require_constant(context, kBias, weights_.bias);
    const Call call = begin(context, NoPrologue::kWidth);
    multiply(context, call, NoPrologue::Rows{call.read, weights_.inner}, [](const Part&) { return NoSideProduct{}; });
  }

  static int input_type(size_t index) { return index < kOwn ? NBitsProduct::input_type(index) : kAnyType; }
  static int input_presence(size_t index) { return index > kScales ? kOptional : kRequired; }
};

CustomOp describe_operator() {
  CustomOp described;
  describe_lifecycle<MatMulNBits>(described);
  described.name = [](const CustomOp*) { return "MatMulNBits"; };
  described.input_count = [](const CustomOp*) { return size_t{MatMulNBits::kInputs}; };
  described.input_type = [](const CustomOp*, size_t index) { return MatMulNBits::input_type(index); };
  described.input_presence = [](const CustomOp*, size_t index) { return MatMulNBits::input_presence(index); };
  described.output_count = [](const CustomOp*) { return size_t{1}; };
  return described;
}

}  // namespace

const CustomOp& matmul_nbits() {
  static const CustomOp described = describe_operator();
  return described;
}

}  // namespace edgelora
