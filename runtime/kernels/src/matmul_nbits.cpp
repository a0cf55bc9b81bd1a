// com.microsoft.MatMulNBits over weights as they lie in the file: nothing is packed, nothing is copied.
//
// It does what graphs of edgelora ask for: constant weights of 4 or 8 bits in blocks of 32 or a multiple, float32 activations, no
// g_idx; anything else is refused when the session is made, or runs.
#include <algorithm>

#include "operators.h"

namespace edgelora {
namespace {

enum Input : size_t { kActivations, kCodes, kScales, kZeroPoints, kGroups, kBias, kInputs };

constexpr size_t kPieces = 32;       // that a product is cut into for the threads, where its tiles allow
constexpr size_t kRowsAtOnce = 256;  // whose activations stay in the second-level cache

// Activations of all products that a thread computes, one after the other.
struct Scratch {
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> offsets;

  Activations fit(const Weights& weights, size_t rows) {
    const size_t count = rows * weights.chunks();
    if (scales.size() < count) codes.resize(count * kChunk), scales.resize(count), offsets.resize(count);
    return {codes.data(), scales.data(), offsets.data()};
  }
};

class MatMulNBits : Operator {
 public:
  MatMulNBits(const Api& api, const OrtKernelInfo* info, const Kernels& kernels)
      : Operator(api, info, "MatMulNBits"), kernels_(kernels) {
    const int64_t inner = attribute(info, "K", int64_t{0}), columns = attribute(info, "N", int64_t{0});
    const int64_t bits = attribute(info, "bits", int64_t{0}), block = attribute(info, "block_size", int64_t{0});
    if (attribute(info, "accuracy_level", int64_t{0}) != 4)
      refuse("accuracy_level is not 4, which is what rounds activations to 8 bits");
    constexpr int64_t kMost = int64_t{1} << 31;  // of K, of N, and of a weight's codes in KiB
    if (inner < 1 || columns < 1 || inner >= kMost || columns >= kMost || inner * columns >> 10 >= kMost)
      refuse("K or N is out of range");
    if (bits != 4 && bits != 8) refuse("bits is not 4 or 8");
    if (block < 32 || block > 2048 || block & (block - 1)) refuse("block_size is not a power of two from 32 to 2048");
    const int64_t blocks = (inner + block - 1) / block, zero_bytes = (blocks * bits + 7) / 8;
    if (tensor(info, kGroups, kAnyType, 0)) refuse("g_idx is not supported");
    weights_.codes = static_cast<const uint8_t*>(tensor(info, kCodes, kUint8, columns * blocks * block * bits / 8));
    weights_.scales = static_cast<const float*>(tensor(info, kScales, kFloat, columns * blocks));
    weights_.zero_points = static_cast<const uint8_t*>(tensor(info, kZeroPoints, kUint8, columns * zero_bytes));
    weights_.bias = static_cast<const float*>(tensor(info, kBias, kFloat, columns));
    if (!weights_.codes || !weights_.scales) refuse("weights or scales are missing");
    weights_.columns = static_cast<size_t>(columns);
    weights_.inner = static_cast<size_t>(inner);
    weights_.blocks = static_cast<size_t>(blocks);
    weights_.block = static_cast<size_t>(block);
    weights_.bits = static_cast<int>(bits);
  }

  void compute(OrtKernelContext* context) const {
    const OrtValue* activations = input(context, kActivations);
    require_constant(context, kZeroPoints, weights_.zero_points);
    require_constant(context, kGroups, nullptr);
    require_constant(context, kBias, weights_.bias);
    Shape shape = describe(api_, activations);
    if (shape.type != kFloat || shape.sizes.empty() || shape.sizes.back() != static_cast<int64_t>(weights_.inner)) {
      refuse("activations are not float32 of K columns");
    }
    size_t rows = 1;
    for (size_t axis = 0; axis + 1 < shape.sizes.size(); ++axis) rows *= static_cast<size_t>(shape.sizes[axis]);
    shape.sizes.back() = static_cast<int64_t>(weights_.columns);
    multiply(context, read<float>(activations), rows, make_output(context, 0, shape.sizes));
  }

 private:
  // Refuses an optional input that the graph computes, which the constructor could not see.
  void require_constant(const OrtKernelContext* context, size_t index, const void* known) const {
    if (known == nullptr && input(context, index) != nullptr) refuse("zero_points, g_idx or bias is not a constant");
  }

  // The values of a constant input of that many elements; null where the graph leaves it out, or computes it.
  const void* tensor(const OrtKernelInfo* info, size_t index, ElementType type, int64_t count) const {
    if (index >= inputs_) return nullptr;
    int constant = 0;
    const OrtValue* value = nullptr;
    check(api_.constant_input(info, index, &constant, &value));
    if (!constant || value == nullptr) return nullptr;
    const Shape shape = describe(api_, value);
    int64_t found = 1;
    for (const int64_t size : shape.sizes) found *= size;
    if (type != kAnyType && (shape.type != type || found != count))
      refuse("a weight has another type or size than N, K, bits and block_size say");
    return read<void>(value);
  }

  void multiply(OrtKernelContext* context, const float* read, size_t rows, float* written) const {
    static thread_local Scratch scratch;
    for (size_t row = 0; row < rows; row += kRowsAtOnce) {
      const size_t count = std::min(kRowsAtOnce, rows - row);
      const Activations rounded = scratch.fit(weights_, count);
      parallel(context, count, count * weights_.inner * sizeof(float), [&](size_t index) {
        const size_t start = index * weights_.chunks();
        kernels_.round(weights_, read + (row + index) * weights_.inner, rounded.codes + start * kChunk, rounded.scales + start,
                       rounded.offsets + start);
      });
      multiply_rounded(context, rounded, count, written + row * weights_.columns);
    }
  }

  void multiply_rounded(OrtKernelContext* context, const Activations& activations, size_t rows, float* written) const {
    const size_t column_bytes = weights_.chunks() * weights_.chunk_bytes() + weights_.blocks * sizeof(float);
    const size_t bytes = weights_.columns * column_bytes * rows;
    const size_t tiles = (weights_.columns + kernels_.tile - 1) / kernels_.tile;
    const size_t piece = (tiles + kPieces - 1) / kPieces;  // tiles
    parallel(context, (tiles + piece - 1) / piece, bytes, [&](size_t index) {
      const size_t begin = index * piece, end = std::min(begin + piece, tiles);
      if (rows == 1) {
        return kernels_.multiply_row(weights_, activations, begin * kernels_.tile,
                                     std::min(end * kernels_.tile, weights_.columns), written);
      }
      for (size_t tile = begin; tile < end; ++tile) {
        kernels_.multiply_rows(weights_, activations, rows, tile * kernels_.tile, std::min(tile + 1, end - 1) * kernels_.tile,
                               written);
      }
    });
  }

  const Kernels& kernels_;
  Weights weights_{};
};

CustomOp describe_operator() {
  CustomOp described;
  describe_life<MatMulNBits>(described);
  described.name = [](const CustomOp*) { return "MatMulNBits"; };
  described.input_count = [](const CustomOp*) { return size_t{kInputs}; };
  described.input_type = [](const CustomOp*, size_t index) -> int {
    return index == kCodes ? kUint8 : index == kActivations || index == kScales ? kFloat : kAnyType;
  };
  described.input_presence = [](const CustomOp*, size_t index) -> int { return index > kScales ? kOptional : kRequired; };
  described.output_count = [](const CustomOp*) { return size_t{1}; };
  return described;
}

}  // namespace

const CustomOp& matmul_nbits() {
  static const CustomOp described = describe_operator();
  return described;
}

}  // namespace edgelora
