// What an instruction set offers.
#pragma once

#include "attention.h"
#include "low_rank.h"
#include "product.h"

namespace edgelora {

struct Kernels {
  const char* name;

  size_t tile;  // columns that multiply_rows works on at a time
  void (*round)(const Weights&, const float* row, int8_t* codes, float* scales, int32_t* offsets);
  // Columns begin … end of one row's product: reads the weights in their order, as fast as memory gives them.
  void (*multiply_row)(const Weights&, const Activations&, size_t begin, size_t end, float* out);
  // Columns of the tile from begin, of all rows' product. Asks for the weights of the tile from next, which comes next.
  void (*multiply_rows)(const Weights&, const Activations&, size_t rows, size_t begin, size_t next, float* out);

  // What queries find at positions begin … end, which lie in one span.
  void (*attend)(const Head&, const Queries&, size_t begin, size_t end, const Found&);
  // Adds what the same queries found in another span.
  void (*add_found)(size_t size, size_t rows, const Found& sum, const Found& other);

  // Asks memory for what is read soon, so that it comes meanwhile.
  void (*ask)(const void* from, size_t bytes);
  // Rows begin … end of A, times so many rows of x and the weights; out (rows, rows of A).
  void (*multiply_down)(const Factors&, const float* x, size_t rows, size_t begin, size_t end, float* out);
  // Adds a part's B, times the part's columns of down (rows, rows of A), to its columns begin … end of the product.
  void (*add_up)(const Factors&, size_t part, const float* down, size_t rows, size_t begin, size_t end, float* product);
};

// Of this machine's instruction set; null where there are none for it.
const Kernels* find_kernels();

}  // namespace edgelora
