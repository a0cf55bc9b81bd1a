// The product together with a live adapter, W·x + B·(w ∘ A·x), with one A for all parts of the product and a B for each.
//
// Graphs define it as a function of the inputs a and b in standard operators, which onnxruntime runs without this library. The
// library reads the input `factors` instead, one for all products of a graph (docs/reference/bundle-format.md), since each input
// costs a step a microsecond. It can hold a mix for each of the texts that are computed together.
#pragma once

#include <cstring>

#include "nbits_product.h"

namespace edgelora {

constexpr size_t kRowsTogether = 32, kDownRows = 4;  // rows of activations and of A in a piece of A·x

// The side product (see NoSideProduct) of a live adapter: computes A·x, (rows, rows of A), and adds B·(w ∘ A·x) to the product.
class LowRank {
 public:
  LowRank(const Kernels& kernels, const Factors& factors, const float* x, size_t rows, float* down, float* product)
      : pieces(factors.rank ? rows > kRowsTogether ? count_pieces(rows, kRowsTogether) : count_pieces(factors.rows(), kDownRows)
                            : 0),
        bytes((factors.rows() * factors.inner + factors.rank * factors.starts[factors.parts]) * sizeof(Half)),
        kernels_(kernels),
        factors_(factors),
        x_(x),
        rows_(rows),
        down_(down),
        product_(product) {}

  // With many rows of x, a piece is some of them and all of A; otherwise it is all rows of x and some of A.
  void work(size_t index) const {
    const size_t all = factors_.rows();
    if (rows_ > kRowsTogether) {
      const size_t row = index * kRowsTogether, count = std::min(kRowsTogether, rows_ - row);
      kernels_.multiply_down(factors_, x_ + row * factors_.inner, count, 0, all, down_ + row * all);
    } else {
      kernels_.multiply_down(factors_, x_, rows_, index * kDownRows, std::min((index + 1) * kDownRows, all), down_);
    }
  }

  void prefetch(size_t begin, size_t end) const {
    in_parts(begin, end, [&](size_t part, size_t from, size_t to) {
      const size_t first = from / kGroup, groups = count_groups(to) - first, size = factors_.rank * kGroup;
      kernels_.prefetch(factors_.b[part] + first * size, groups * size * sizeof(Half));
    });
  }

  void add(size_t begin, size_t end) const {
    in_parts(begin, end,
             [&](size_t part, size_t from, size_t to) { kernels_.add_up(factors_, part, down_, rows_, from, to, product_); });
  }

  const size_t pieces, bytes;

 private:
  // Calls call(part, from, to), with columns relative to the part, for each part that overlaps the product's columns begin … end.
  template <typename Call>
  void in_parts(size_t begin, size_t end, const Call& call) const {
    if (!factors_.rank) return;
    for (size_t part = 0; part < factors_.parts; ++part) {
      const size_t start = factors_.starts[part], from = std::max(begin, start), to = std::min(end, factors_.starts[part + 1]);
      if (from < to) call(part, from - start, to - start);
    }
  }

  const Kernels& kernels_;
  const Factors& factors_;
  const float* x_;
  const size_t rows_;
  float *down_, *product_;
};

// Rows of activations that follow each other and have one mix.
struct Run {
  size_t rows;
  Factors factors;
};

// The side product of rows with several mixes.
class LowRanks {
 public:
  // down: memory, which this uses.
  LowRanks(const Kernels& kernels, const std::vector<Run>& runs, const NBitsProduct::Part& part, std::vector<float>& down) {
    const auto visit = [&](const auto& use) {
      size_t start = 0;
      for (const Run& run : runs) {
        const size_t from = std::max(start, part.first), to = std::min(start += run.rows, part.first + part.rows);
        if (from < to && run.factors.rank) use(run.factors, from - part.first, to - from);
      }
    };
    size_t needed = 0;
    visit([&](const Factors& factors, size_t, size_t rows) { needed += rows * factors.rows(); });
    down.resize(needed);
    float* free = down.data();
    visit([&](const Factors& factors, size_t row, size_t rows) {
      parts_.emplace_back(kernels, factors, part.read + row * factors.inner, rows, free,
                          part.written + row * factors.starts[factors.parts]);
      free += rows * factors.rows();
      pieces += parts_.back().pieces;
      bytes = std::max(bytes, parts_.back().bytes);
    });
  }

  void work(size_t index) const {
    for (const LowRank& part : parts_) {
      if (index < part.pieces) return part.work(index);
      index -= part.pieces;
    }
  }
  void prefetch(size_t begin, size_t end) const {
    for (const LowRank& part : parts_) part.prefetch(begin, end);
  }
  void add(size_t begin, size_t end) const {
    for (const LowRank& part : parts_) part.add(begin, end);
  }

  size_t pieces = 0, bytes = 0;

 private:
  std::vector<LowRank> parts_;
};

class LiveProduct : public NBitsProduct {
 public:
  enum Input : size_t { kFactors = kOwn, kDown, kUp };

  // parts: of the product. name: as in NBitsProduct.
  LiveProduct(const Api& api, const OrtKernelInfo* info, const char* name, const Kernels& kernels, size_t parts)
      : NBitsProduct(api, info, name, kernels), parts_(parts), slot_(static_cast<size_t>(attribute(info, "slot", int64_t{0}))) {}

  template <typename Rows>
  void multiply_live(OrtKernelContext* context, const Call& call, const Rows& rows) const {
    static thread_local std::vector<float> down;  // the thread's next product reuses the memory
    static thread_local std::vector<Run> runs;
    read_runs(context, call.rows, runs);
    if (runs.size() == 1) {
      return multiply(context, call, rows, [&](const Part& part) {
        down.resize(part.rows * runs[0].factors.rows());
        return LowRank(kernels_, runs[0].factors, part.read, part.rows, down.data(), part.written);
      });
    }
    multiply(context, call, rows, [&](const Part& part) { return LowRanks(kernels_, runs, part, down); });
  }

 private:
  // The input begins with the number of slots, then holds for each the offset of its factors, their rank, and the columns of the
  // product that each part has.
  struct Slot {
    int64_t offset, rank, columns[kMaxParts];
  };

  // The runs of a call's rows. The input holds the factors of one mix, or starts with minus the number of texts that are
  // computed together, and where in it the mix of each begins (0: it has none).
  void read_runs(OrtKernelContext* context, size_t rows, std::vector<Run>& runs) const {
    runs.clear();
    const OrtValue* tensor = input(context, kFactors);
    const Shape shape = describe(api_, tensor);
    const size_t size = shape.sizes.size() == 1 ? static_cast<size_t>(shape.sizes[0]) : 0;
    if (size == 0) {
      const Shape a = describe(api_, input(context, kDown));
      if (a.sizes.empty() || a.sizes[0] != 0) refuse("A is given without the input factors, which edgelora's kernels read");
      runs.push_back({rows, no_factors()});
      return;
    }
    const auto* bytes = read<uint8_t>(tensor);
    int64_t count = 0;
    if (size >= sizeof count) std::memcpy(&count, bytes, sizeof count);
    if (count >= 0) {
      runs.push_back({rows, read_factors(bytes, size)});
      return;
    }
    if (count < -static_cast<int64_t>(size / sizeof count - 1)) refuse("the factors are damaged");
    const auto texts = static_cast<size_t>(-count);
    if (rows % texts) refuse("the factors are those of another number of texts");
    uint64_t last = 0;
    for (size_t text = 0; text < texts; ++text) {
      uint64_t offset = 0;
      std::memcpy(&offset, bytes + (text + 1) * sizeof offset, sizeof offset);
      if (offset > size) refuse("the factors are damaged");
      if (text && offset == last) {
        runs.back().rows += rows / texts;
      } else {
        runs.push_back({rows / texts, offset ? read_factors(bytes + offset, size - offset) : no_factors()});
      }
      last = offset;
    }
  }

  Factors no_factors() const {
    Factors factors{};
    factors.parts = parts_;
    factors.inner = weights_.inner;
    return factors;
  }

  // The factors of a mix in `size` bytes.
  Factors read_factors(const uint8_t* bytes, size_t size) const {
    Factors factors = no_factors();
    uint64_t count = 0;
    if (size >= sizeof count) std::memcpy(&count, bytes, sizeof count);
    if (reinterpret_cast<uintptr_t>(bytes) % sizeof(float) || slot_ >= count || count > (size - sizeof count) / sizeof(Slot))
      refuse("the factors lack this slot");
    Slot slot{};
    std::memcpy(&slot, bytes + sizeof count + slot_ * sizeof slot, sizeof slot);
    constexpr int64_t kMaxRank = 1 << 20;
    const auto offset = static_cast<size_t>(slot.offset);
    if (slot.rank < 0 || slot.rank > kMaxRank || offset > size || offset % sizeof(float)) refuse("the factors are damaged");
    factors.rank = static_cast<size_t>(slot.rank);
    factors.weights = reinterpret_cast<const float*>(bytes + offset);
    factors.a = reinterpret_cast<const Half*>(factors.weights + factors.rows());
    const Half* b = factors.a + factors.rows() * count_groups(factors.inner) * kGroup;
    for (size_t part = 0; part < parts_; ++part) {
      const auto columns = static_cast<size_t>(slot.columns[part]);
      if (columns > weights_.columns) refuse("the factors do not match the product");
      factors.b[part] = b;
      factors.starts[part + 1] = factors.starts[part] + columns;
      b += count_groups(columns) * factors.rank * kGroup;
    }
    if (factors.starts[parts_] != weights_.columns) refuse("the factors do not match the product");
    if (static_cast<size_t>(reinterpret_cast<const uint8_t*>(b) - bytes) > size) refuse("the factors are damaged");
    return factors;
  }

  size_t parts_, slot_;
};

}  // namespace edgelora
