// The prologues of products: what a product's rows of activations are computed from. Each is a template argument of the
// operators.
//
// Graphs define a prologue and its product as one function of standard operators, which onnxruntime runs without this library. As
// one operator, a step has half the nodes, and each node costs some microseconds.
#pragma once

#include "nbits_product.h"

namespace edgelora {

// Rows that are the first input.
struct NoPrologue {
  static constexpr const char* kPrefix = "";
  static constexpr size_t kInputs = 0, kOutputs = 1;  // inputs after the product's own, and all outputs
  static constexpr size_t kWidth = 1;                 // of the first input, in rows of the product

  NoPrologue(const NBitsProduct&, const OrtKernelInfo*) {}

  struct Rows {
    static constexpr bool kComputed = false;
    const float* given;
    size_t size;
    const float* get(size_t row, float*) const { return given + row * size; }
  };
  Rows begin(const NBitsProduct& product, OrtKernelContext*, const NBitsProduct::Call& call) const {
    return {call.read, product.weights_.inner};
  }
};

// Rows that are the norm of a sum. Inputs: what is added to the first input, and the norm's weight. The second output is the sum.
struct SkipNorm {
  static constexpr const char* kPrefix = "SkipNorm";
  static constexpr size_t kInputs = 2, kOutputs = 2, kWidth = 1;

  SkipNorm(const NBitsProduct& product, const OrtKernelInfo* info) : update_(product.inputs_ - 2) {
    const auto size = static_cast<int64_t>(product.weights_.inner);
    norm_ = {static_cast<const float*>(product.constant(info, update_ + 1, kFloat, size)),
             product.attribute(info, "epsilon", 0.0f)};
    if (norm_.weight == nullptr) product.refuse("the norm's weight is not a constant");
  }

  struct Rows {
    static constexpr bool kComputed = true;
    const Kernels& kernels;
    const Norm& norm;
    const float *sum, *update;
    float* total;
    size_t size;
    const float* get(size_t row, float* to) const {
      const size_t start = row * size;
      kernels.normalize(norm, sum + start, update + start, size, total + start, to);
      return to;
    }
  };
  Rows begin(const NBitsProduct& product, OrtKernelContext* context, const NBitsProduct::Call& call) const {
    const OrtValue* sum = product.input(context, NBitsProduct::kActivations);
    const OrtValue* update = product.input(context, update_);
    const Shape shape = describe(product.api_, sum), other = describe(product.api_, update);
    if (other.type != kFloat || other.sizes != shape.sizes) product.refuse("the summands differ in type or shape");
    float* total = product.make_output(context, 1, shape.sizes);
    return {product.kernels_, norm_, call.read, product.read<float>(update), total, product.weights_.inner};
  }

 private:
  size_t update_;
  Norm norm_{};
};

// Rows that are an activation function of the first half of the first input, times the second half.
template <Activation kActivation>
struct Glu {
  static constexpr const char* kPrefix = kActivation == Activation::kSilu ? "SwiGlu" : "GeGlu";
  static constexpr size_t kInputs = 0, kOutputs = 1, kWidth = 2;

  Glu(const NBitsProduct&, const OrtKernelInfo*) {}

  struct Rows {
    static constexpr bool kComputed = true;
    const Kernels& kernels;
    const float* given;
    size_t size;
    const float* get(size_t row, float* to) const {
      const float* gates = given + 2 * row * size;
      kernels.gate(kActivation, gates, gates + size, size, to);
      return to;
    }
  };
  Rows begin(const NBitsProduct& product, OrtKernelContext*, const NBitsProduct::Call& call) const {
    return {product.kernels_, call.read, product.weights_.inner};
  }
};

}  // namespace edgelora
