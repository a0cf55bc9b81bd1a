// The operands of attention: a head of keys and values, and the queries that share it.
#pragma once

#include <cstddef>

namespace edgelora {

constexpr size_t kSpan = 256;  // positions whose keys are read together; spans start at multiples of this

// A head of keys and values, and how queries attend to it.
struct Head {
  const float* keys;  // (capacity, size), like values
  const float* values;
  size_t capacity;  // positions that can be read; those that no step has written hold arbitrary values
  size_t size;      // a multiple of 16
  float cap;        // soft cap: scores become cap * tanh(score / cap); 0: none
  size_t window;    // positions that a query sees: its own and those before it; 0: all
};

// Queries of a head: `group` for each position, starting at `first`.
struct Queries {
  const float* values;  // (rows, size), already scaled
  size_t rows;
  size_t first;
  size_t group;

  size_t position(size_t row) const { return first + row / group; }
};

// Attention over some spans, before the division by the sum of weights, so that two of them can be merged: online softmax
// (Milakov and Gimelshein 2018, arXiv 1805.02867).
struct PartialSoftmax {
  float* values;  // (rows, size): sums of values, weighted by exp(score - maximum)
  float* maxima;  // (rows): the largest score
  float* sums;    // (rows): of the weights
};

}  // namespace edgelora
