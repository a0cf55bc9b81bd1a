// The factors of a live adapter, which adds B·(w ∘ A·x) to a product, in fp16 as the input `factors` holds them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgelora {

constexpr size_t kMaxParts = 3;  // of a product: they share an A, and each has its B
constexpr size_t kGroup = 16;    // columns of B that are stored together; rows of A are padded to a multiple

struct Half {
  uint16_t bits;
};

constexpr size_t count_groups(size_t size) { return (size + kGroup - 1) / kGroup; }

struct Factors {
  size_t parts, rank, inner;     // inner: length of a row of activations
  const float* weights;          // (parts * rank)
  const Half* a;                 // (parts * rank, inner padded to groups)
  const Half* b[kMaxParts];      // (groups, rank, kGroup)
  size_t starts[kMaxParts + 1];  // the product's column at which each B begins; after the last, the width

  size_t rows() const { return parts * rank; }  // of A
};

}  // namespace edgelora
