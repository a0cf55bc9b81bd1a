// The common part of MatMulNBits and LiveMatMulNBits: a weight of 4 or 8 bits, and how threads share the product with it.
//
// Weights are read as the file stores them; nothing is packed or copied. They must be as edgelora's graphs have them: constants
// of 4 or 8 bits in blocks of a power of two from 32 on, for activations in float32. Anything else is refused, when the session
// opens or when it runs.
#pragma once

#include <algorithm>
#include <atomic>
#include <thread>

#include "operators.h"

namespace edgelora {

// A side product: computed beside a product, in `pieces`, and then added to its columns. This one is empty.
struct NoSideProduct {
  static constexpr size_t pieces = 0, bytes = 0;
  void work(size_t) const {}              // computes a piece
  void prefetch(size_t, size_t) const {}  // prefetches what is added to these columns soon
  void add(size_t, size_t) const {}       // adds to these columns, once all pieces are done
};

class NBitsProduct : public Operator {
 public:
  enum Input : size_t { kActivations, kCodes, kScales, kZeroPoints, kOwn };  // an operator's own inputs follow these

  // Rows of a call: the first input, the number of rows, and the product (rows, N).
  struct Call {
    const float* read;
    size_t rows;
    float* written;
  };
  // Some rows of a call from `first` on: the activations (rows, K) and the product (rows, N).
  struct Part : Call {
    size_t first;
  };

  // The types of the common inputs.
  static int input_type(size_t index) { return index == kCodes ? kUint8 : index == kZeroPoints ? kAnyType : kFloat; }

  NBitsProduct(const Api& api, const OrtKernelInfo* info, const char* name, const Kernels& kernels)
      : Operator(api, info, name), kernels_(kernels) {
    const int64_t inner = attribute(info, "K", int64_t{0}), columns = attribute(info, "N", int64_t{0});
    const int64_t bits = attribute(info, "bits", int64_t{0}), block = attribute(info, "block_size", int64_t{0});
    if (attribute(info, "accuracy_level", int64_t{0}) != 4)
      refuse("accuracy_level is not 4, the level that rounds activations to 8 bits");
    constexpr int64_t kMax = int64_t{1} << 31;  // of K, of N, and of a weight's codes in KiB
    if (inner < 1 || columns < 1 || inner >= kMax || columns >= kMax || inner * columns >> 10 >= kMax)
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

  // The values of a constant input of that many elements; null if the graph leaves it out or computes it.
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
      refuse("a weight's type or size does not match N, K, bits and block_size");
    return read<void>(value);
  }

  // Refuses an optional input that the graph computes, which the constructor cannot detect.
  void require_constant(const OrtKernelContext* context, size_t index, const void* known) const {
    if (known == nullptr && input(context, index) != nullptr) refuse("zero_points, g_idx or bias is not a constant");
  }

  // width: of the first input, in rows of activations.
  Call begin(OrtKernelContext* context, size_t width) const {
    const OrtValue* activations = input(context, kActivations);
    require_constant(context, kZeroPoints, weights_.zero_points);
    Shape shape = describe(api_, activations);
    if (shape.type != kFloat || shape.sizes.empty() || shape.sizes.back() != static_cast<int64_t>(weights_.inner * width))
      refuse("activations are not float32 with K columns");
    size_t rows = 1;
    for (size_t axis = 0; axis + 1 < shape.sizes.size(); ++axis) rows *= static_cast<size_t>(shape.sizes[axis]);
    shape.sizes.back() = static_cast<int64_t>(weights_.columns);
    return {read<float>(activations), rows, make_output(context, 0, shape.sizes)};
  }

  // The product of a call, some rows at a time. rows: gives the activations, see prologues.h. make_side(part): the side product
  // of a part of the call, see NoSideProduct.
  template <typename Rows, typename MakeSide>
  void multiply(OrtKernelContext* context, const Call& call, const Rows& rows, const MakeSide& make_side) const {
    Scratch& scratch = own_scratch();
    for (size_t row = 0; row < call.rows; row += kRowsAtOnce) {
      const size_t count = std::min(kRowsAtOnce, call.rows - row);
      const Activations rounded = scratch.fit(weights_, count);
      float* computed = Rows::kComputed ? scratch.fit_rows(count * weights_.inner) : nullptr;
      parallel(context, count, count * weights_.inner * sizeof(float), [&](size_t index) {
        const size_t start = index * weights_.chunks();
        const float* given = rows.get(row + index, Rows::kComputed ? computed + index * weights_.inner : nullptr);
        kernels_.round(weights_, given, rounded.codes + start * kChunk, rounded.scales + start, rounded.offsets + start);
      });
      const float* read = Rows::kComputed ? computed : call.read + row * weights_.inner;
      const Part part{{read, count, call.written + row * weights_.columns}, row};
      multiply_rounded(context, rounded, part, make_side(part));
    }
  }

  const Kernels& kernels_;
  Weights weights_{};

 private:
  static constexpr size_t kPieces = 32;       // of a product, for the threads to share, if it has enough tiles
  static constexpr size_t kRowsAtOnce = 256;  // their activations stay in the second-level cache

  // Memory for activations, which all products of a thread reuse.
  struct Scratch {
    std::vector<int8_t> codes;
    std::vector<float> scales;
    std::vector<int32_t> offsets;
    std::vector<float> rows;

    Activations fit(const Weights& weights, size_t rows) {
      const size_t count = rows * weights.chunks();
      if (scales.size() < count) codes.resize(count * kChunk), scales.resize(count), offsets.resize(count);
      return {codes.data(), scales.data(), offsets.data()};
    }
    float* fit_rows(size_t size) {
      if (rows.size() < size) rows.resize(size);
      return rows.data();
    }
  };

  static Scratch& own_scratch() {
    static thread_local Scratch scratch;
    return scratch;
  }

  // Every thread helps with the side product before its first piece, and adds it once all of it is done; until then, other
  // threads are at work on the rest. That no piece is left is read from the thread's own cache, unlike a counter that all threads
  // write.
  template <typename SideProduct>
  void multiply_rounded(OrtKernelContext* context, const Activations& activations, const Call& call,
                        const SideProduct& side) const {
    const size_t column_bytes = weights_.chunks() * weights_.chunk_bytes() + weights_.blocks * sizeof(float);
    const size_t tiles = count_pieces(weights_.columns, kernels_.tile);
    const size_t piece = count_pieces(tiles, kPieces);  // tiles
    const auto column = [&](size_t tile) { return std::min(tile * kernels_.tile, weights_.columns); };
    alignas(64) std::atomic<size_t> taken{0};
    alignas(64) std::atomic<size_t> done{0};
    const auto work = [&](size_t place) {
      while (taken.load(std::memory_order_relaxed) < side.pieces) {
        const size_t index = taken.fetch_add(1, std::memory_order_relaxed);
        if (index >= side.pieces) break;
        side.work(index);
        done.fetch_add(1, std::memory_order_release);
      }
      const size_t begin = place * piece, end = std::min(begin + piece, tiles);
      const auto add = [&](size_t from, size_t to) {
        while (done.load(std::memory_order_acquire) < side.pieces) std::this_thread::yield();
        side.add(column(from), column(to));
      };
      const size_t step = call.rows == 1 ? end - begin : 1;
      for (size_t tile = begin; tile < end; tile += step) {
        side.prefetch(column(tile), column(tile + step));
        if (call.rows == 1) {
          kernels_.multiply_row(weights_, activations, column(tile), column(tile + step), call.written);
        } else {
          kernels_.multiply_rows(weights_, activations, call.rows, column(tile), column(std::min(tile + 1, tiles - 1)),
                                 call.written);
        }
        add(tile, tile + step);
      }
    };
    parallel(context, count_pieces(tiles, piece), (weights_.columns * column_bytes + side.bytes) * call.rows, work);
  }
};

}  // namespace edgelora
