// The operators of the domain "edgelora": MatMulNBits and LiveMatMulNBits1 … 3, the product of a live adapter with that many
// parts, each also with a prologue, whose name precedes the operator's. MatMulNBits without a prologue is onnxruntime's.
#include "live_product.h"
#include "prologues.h"

namespace edgelora {
namespace {

template <typename Prologue>
class FusedMatMulNBits : NBitsProduct {
 public:
  static constexpr const char* kName = "MatMulNBits";
  static constexpr size_t kInputs = kOwn;  // of the product

  FusedMatMulNBits(const Api& api, const OrtKernelInfo* info, const Kernels& kernels)
      : NBitsProduct(api, info, kName, kernels), prologue_(*this, info) {}

  void compute(OrtKernelContext* context) const {
    const Call call = begin(context, Prologue::kWidth);
    multiply(context, call, prologue_.begin(*this, context, call), [](const Part&) { return NoSideProduct{}; });
  }

 private:
  Prologue prologue_;
};

template <typename Prologue, size_t Parts>
class LiveMatMulNBits : LiveProduct {
 public:
  static constexpr const char* kName = Parts == 1 ? "LiveMatMulNBits1" : Parts == 2 ? "LiveMatMulNBits2" : "LiveMatMulNBits3";
  static constexpr size_t kInputs = kUp + Parts;

  LiveMatMulNBits(const Api& api, const OrtKernelInfo* info, const Kernels& kernels)
      : LiveProduct(api, info, kName, kernels, Parts), prologue_(*this, info) {}

  void compute(OrtKernelContext* context) const {
    const Call call = begin(context, Prologue::kWidth);
    multiply_live(context, call, prologue_.begin(*this, context, call));
  }

 private:
  Prologue prologue_;
};

template <typename Prologue, typename Implementation>
CustomOp describe_operator() {
  static const std::string name = std::string(Prologue::kPrefix) + Implementation::kName;
  CustomOp described;
  describe_lifecycle<Implementation>(described);
  described.name = [](const CustomOp*) { return name.c_str(); };
  described.input_count = [](const CustomOp*) { return Implementation::kInputs + Prologue::kInputs; };
  described.input_type = [](const CustomOp*, size_t index) -> int {
    if (index < NBitsProduct::kOwn) return NBitsProduct::input_type(index);
    return index == LiveProduct::kFactors && index < Implementation::kInputs ? kUint8 : kFloat;
  };
  described.input_presence = [](const CustomOp*, size_t index) -> int {
    return index == NBitsProduct::kZeroPoints ? kOptional : kRequired;
  };
  described.output_count = [](const CustomOp*) { return Prologue::kOutputs; };
  return described;
}

template <typename Prologue>
void add_live(std::vector<CustomOp>& operators) {
  operators.push_back(describe_operator<Prologue, LiveMatMulNBits<Prologue, 1>>());
  operators.push_back(describe_operator<Prologue, LiveMatMulNBits<Prologue, 2>>());
  operators.push_back(describe_operator<Prologue, LiveMatMulNBits<Prologue, 3>>());
}

template <typename Prologue>
void add_fused(std::vector<CustomOp>& operators) {
  operators.push_back(describe_operator<Prologue, FusedMatMulNBits<Prologue>>());
  add_live<Prologue>(operators);
}

std::vector<CustomOp> describe_operators() {
  std::vector<CustomOp> operators;
  add_live<NoPrologue>(operators);
  add_fused<SkipNorm>(operators);
  add_fused<Glu<Activation::kSilu>>(operators);
  add_fused<Glu<Activation::kGelu>>(operators);
  return operators;
}

}  // namespace

const std::vector<CustomOp>& own_operators() {
  static const std::vector<CustomOp> described = describe_operators();
  return described;
}

}  // namespace edgelora
