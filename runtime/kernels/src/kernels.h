// The functions that an instruction set provides.
#pragma once

#include "attention.h"
#include "low_rank.h"
#include "product.h"
#include "row.h"

namespace edgelora {

struct Kernels {
  const char* name;

  size_t tile;  // columns that multiply_rows computes at a time
  void (*round)(const Weights&, const float* row, int8_t* codes, float* scales, int32_t* offsets);
  // Columns begin … end of one row's product. Reads the weights in order, at the speed of memory.
  void (*multiply_row)(const Weights&, const Activations&, size_t begin, size_t end, float* out);
  // The tile of columns at `begin` of all rows' product. Prefetches the weights of the tile at `next`.
  void (*multiply_rows)(const Weights&, const Activations&, size_t rows, size_t begin, size_t next, float* out);

  // total = sum + update; normed = total / its root mean square * the norm's weight.
  void (*normalize)(const Norm&, const float* sum, const float* update, size_t size, float* total, float* normed);
  // gated = activation(gates) * up.
  void (*gate)(Activation, const float* gates, const float* up, size_t size, float* gated);

  // Attention over positions begin … end, which lie in one span.
  void (*attend)(const Head&, const Queries&, size_t begin, size_t end, const PartialSoftmax&);
  // Merges the result of another span of the same queries into `sum`.
  void (*merge_partials)(size_t size, size_t rows, const PartialSoftmax& sum, const PartialSoftmax& other);

  // Prefetches bytes that are read soon.
  void (*prefetch)(const void* from, size_t bytes);
  // Rows begin … end of A times `rows` rows of x, scaled by the weights; out (rows, rows of A).
  void (*multiply_down)(const Factors&, const float* x, size_t rows, size_t begin, size_t end, float* out);
  // Adds a part's B times the part's columns of down (rows, rows of A) to the part's columns begin … end of the product.
  void (*add_up)(const Factors&, size_t part, const float* down, size_t rows, size_t begin, size_t end, float* product);
};

// The kernels for this machine; null if none supports it.
const Kernels* find_kernels();

}  // namespace edgelora
