// What MatMulNBits and LiveMatMulNBits have in common: a weight of 4 or 8 bits, and how threads share the product with it.
//
// Weights are read as they lie in the file: nothing is packed, nothing is copied. They are what graphs of edgelora hold:
// constants of 4 or 8 bits in blocks of 32 or a multiple, for activations in float32; anything else is refused when the session
// is made, or runs.
#pragma once

#include <algorithm>
#include <atomic>
#include <thread>

#include "operators.h"

namespace edgelora {

// What is worked out beside a product, in so many pieces, and then added to its columns: nothing.
struct Alone {
  static constexpr size_t pieces = 0, bytes = 0;
  void work(size_t) const {}         // on a piece
  void ask(size_t, size_t) const {}  // memory for what is added to these columns soon
  void add(size_t, size_t) const {}  // to these columns, once all pieces are there
};

class NBitsProduct : protected Operator {
 protected:
  enum Input : size_t { kActivations, kCodes, kScales, kZeroPoints, kOwn };  // an operator's own inputs come behind these

  // A call's activations (rows, K) and its product (rows, N).
  struct Call {
    const float* read;
    size_t rows;
    float* written;
  };

  // Of the inputs before an operator's own.
  static int input_type(size_t index) { return index == kCodes ? kUint8 : index == kZeroPoints ? kAnyType : kFloat; }

  NBitsProduct(const Api& api, const OrtKernelInfo* info, const char* name, const Kernels& kernels)
      : Operator(api, info, name), kernels_(kernels) {
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
    weights_.codes = static_cast<const uint8_t*>(constant(info, kCodes, kUint8, columns * blocks * block * bits / 8));
    weights_.scales = static_cast<const float*>(constant(info, kScales, kFloat, columns * blocks));
    weights_.zero_points = static_cast<const uint8_t*>(constant(info, kZeroPoints, kUint8, columns * zero_bytes));
    if (!weights_.codes || !weights_.scales) refuse("weights or scales are missing");
    weights_.columns = static_cast<size_t>(columns);
    weights_.inner = static_cast<size_t>(inner);
    weights_.blocks = static_cast<size_t>(blocks);
    weights_.block = static_cast<size_t>(block);
    weights_.bits = static_cast<int>(bits);
  }

  // The values of a constant input of that many elements; null where the graph leaves it out, or computes it.
  const void* constant(const OrtKernelInfo* info, size_t index, ElementType type, int64_t count) const {
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

  // Refuses an optional input that the graph computes, which the constructor could not see.
  void require_constant(const OrtKernelContext* context, size_t index, const void* known) const {
    if (known == nullptr && input(context, index) != nullptr) refuse("zero_points, g_idx or bias is not a constant");
  }

  Call begin(OrtKernelContext* context) const {
    const OrtValue* activations = input(context, kActivations);
    require_constant(context, kZeroPoints, weights_.zero_points);
    Shape shape = describe(api_, activations);
    if (shape.type != kFloat || shape.sizes.empty() || shape.sizes.back() != static_cast<int64_t>(weights_.inner)) {
      refuse("activations are not float32 of K columns");
    }
    size_t rows = 1;
    for (size_t axis = 0; axis + 1 < shape.sizes.size(); ++axis) rows *= static_cast<size_t>(shape.sizes[axis]);
    shape.sizes.back() = static_cast<int64_t>(weights_.columns);
    return {read<float>(activations), rows, make_output(context, 0, shape.sizes)};
  }

  // The product of a call, some rows at a time. beside(part of the call): what is worked out beside its product, see Alone.
  template <typename Beside>
  void multiply(OrtKernelContext* context, const Call& call, const Beside& beside) const {
    static thread_local Scratch scratch;
    for (size_t row = 0; row < call.rows; row += kRowsAtOnce) {
      const Call part{call.read + row * weights_.inner, std::min(kRowsAtOnce, call.rows - row),
                      call.written + row * weights_.columns};
      const Activations rounded = scratch.fit(weights_, part.rows);
      parallel(context, part.rows, part.rows * weights_.inner * sizeof(float), [&](size_t index) {
        const size_t start = index * weights_.chunks();
        kernels_.round(weights_, part.read + index * weights_.inner, rounded.codes + start * kChunk, rounded.scales + start,
                       rounded.offsets + start);
      });
      multiply_rounded(context, rounded, part, beside(part));
    }
  }

  const Kernels& kernels_;
  Weights weights_{};

 private:
  static constexpr size_t kPieces = 32;       // that a product is cut into for the threads, where its tiles allow
  static constexpr size_t kRowsAtOnce = 256;  // whose activations stay in the second-level cache

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

  // Every thread helps with what is beside before its first piece, and adds it once all of it is there: what a thread waits for
  // is in another's hands. That there is nothing left is then read in the thread's own cache, which a common count of pieces is
  // not.
  template <typename Beside>
  void multiply_rounded(OrtKernelContext* context, const Activations& activations, const Call& call, const Beside& beside) const {
    const size_t column_bytes = weights_.chunks() * weights_.chunk_bytes() + weights_.blocks * sizeof(float);
    const size_t tiles = count_pieces(weights_.columns, kernels_.tile);
    const size_t piece = count_pieces(tiles, kPieces);  // tiles
    const auto column = [&](size_t tile) { return std::min(tile * kernels_.tile, weights_.columns); };
    alignas(64) std::atomic<size_t> taken{0};
    alignas(64) std::atomic<size_t> done{0};
    const auto work = [&](size_t place) {
      while (taken.load(std::memory_order_relaxed) < beside.pieces) {
        const size_t index = taken.fetch_add(1, std::memory_order_relaxed);
        if (index >= beside.pieces) break;
        beside.work(index);
        done.fetch_add(1, std::memory_order_release);
      }
      const size_t begin = place * piece, end = std::min(begin + piece, tiles);
      const auto add = [&](size_t from, size_t to) {
        while (done.load(std::memory_order_acquire) < beside.pieces) std::this_thread::yield();
        beside.add(column(from), column(to));
      };
      beside.ask(column(begin), column(end));
      if (call.rows == 1) {
        kernels_.multiply_row(weights_, activations, column(begin), column(end), call.written);
        return add(begin, end);
      }
      for (size_t tile = begin; tile < end; ++tile) {
        kernels_.multiply_rows(weights_, activations, call.rows, column(tile), column(std::min(tile + 1, end - 1)), call.written);
        add(tile, tile + 1);
      }
    };
    parallel(context, count_pieces(tiles, piece), (weights_.columns * column_bytes + beside.bytes) * call.rows, work);
  }
};

}  // namespace edgelora
