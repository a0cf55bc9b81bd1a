// Attention of the queries that share a head of keys and values: what it works on.
#pragma once

#include <cstddef>

namespace edgelora {

constexpr size_t kSpan = 256;  // positions whose keys are attended to together; spans start at multiples of it

// A head of keys and values, and how queries look at it.
struct Head {
  const float* keys;  // (capacity, size), as values are
  const float* values;
  size_t capacity;  // positions that may be read; what lies behind those that are written means nothing
  size_t size;      // a multiple of 16
  float cap;        // of scores, which are cap * tanh(score / cap) then; 0: none
  size_t window;    // positions that a query sees, its own and those before; 0: all
};

// Queries of a head: `group` for each position from first on.
struct Queries {
  const float* values;  // (rows, size), scaled
  size_t rows;
  size_t first;
  size_t group;

  size_t position(size_t row) const { return first + row / group; }
};

// What queries found in some spans: sums of values weighted by exp(score - greatest), and the sums of those weights.
struct Found {
  float* values;    // (rows, size)
  float* greatest;  // (rows)
  float* weights;   // (rows)
};

}  // namespace edgelora
