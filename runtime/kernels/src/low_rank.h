// What a live adapter adds to a product, B·(w ∘ A·x): the factors as they lie in the input `factors`, in fp16.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgelora {

constexpr size_t kMostParts = 3;  // of a product: one A for all of them, a B for each
constexpr size_t kGroup = 16;     // columns of B that lie together; rows of A are filled up to a multiple

struct Half {
  uint16_t bits;
};

constexpr size_t count_groups(size_t size) { return (size + kGroup - 1) / kGroup; }

struct Factors {
  size_t parts, rank, inner;      // inner: length of a row of activations
  const float* weights;           // (parts * rank)
  const Half* a;                  // (parts * rank, inner in groups)
  const Half* b[kMostParts];      // (groups, rank, kGroup)
  size_t starts[kMostParts + 1];  // the column of the product that each B begins at; behind the last its width

  size_t rows() const { return parts * rank; }  // of A
};

}  // namespace edgelora
