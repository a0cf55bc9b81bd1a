// Products with the factors of adapters, which are narrow matrices of floats: what they work on.
#pragma once

#include <cstddef>

namespace edgelora {

// A matrix (rows, columns), row by row.
struct Matrix {
  const float* values;
  size_t rows, columns;
};

}  // namespace edgelora
