// Products with narrow matrices over an instruction set, which its own source file describes (struct Isa there).
#pragma once

#include <algorithm>
#include <cstring>

#include "low_rank.h"
#include "tile.h"

namespace edgelora {
namespace {  // see tile.h

constexpr size_t kDots = 4;  // rows of a matrix that a row of activations meets at once

// The vector from a place of a row on; zeros behind its end.
template <typename Isa>
typename Isa::Float load_part(const float* row, size_t place, size_t size) {
  if (place + Isa::kLanes <= size) return Isa::load(row + place);
  return place < size ? Isa::load(row + place, size - place) : Isa::zero();
}

// Asks for values in their order: factors are read once a step, and are too short for hardware to foresee.
template <typename Isa>
void ask_for_all(const float* from, size_t count) {
  for (size_t place = 0; place < count; place += 16) Isa::ask_for(from + place);
}

// out[row] = x · matrix[row], for rows begin … end of a matrix that every x has as many values as columns of.
template <typename Isa>
void multiply_transposed(const float* x, size_t rows, const Matrix& matrix, size_t begin, size_t end, float* out) {
  using Float = typename Isa::Float;
  const size_t size = matrix.columns;
  ask_for_all<Isa>(matrix.values + begin * size, (end - begin) * size);
  in_groups<kDots>(end - begin, [&](size_t first, auto many) {
    constexpr size_t dots = many;
    const float* read = matrix.values + (begin + first) * size;
    in_groups<2>(rows, [&](size_t row, auto some) {
      constexpr size_t group = some;
      Float sums[group][dots];
      for (auto& row_sums : sums)
        for (Float& sum : row_sums) sum = Isa::zero();
      for (size_t place = 0; place < size; place += Isa::kLanes) {
        Float values[dots];
        for (size_t dot = 0; dot < dots; ++dot) values[dot] = load_part<Isa>(read + dot * size, place, size);
        for (size_t i = 0; i < group; ++i) {
          const Float value = load_part<Isa>(x + (row + i) * size, place, size);
          for (size_t dot = 0; dot < dots; ++dot) sums[i][dot] = Isa::add_product(sums[i][dot], value, values[dot]);
        }
      }
      for (size_t i = 0; i < group; ++i) {
        for (size_t dot = 0; dot < dots; ++dot) out[(row + i) * matrix.rows + begin + first + dot] = Isa::sum(sums[i][dot]);
      }
    });
  });
}

// Columns begin … end of out = y + x · matrix. x: rows apart; out and y: rows out_apart.
template <typename Isa>
void add_low_rank(const float* x, size_t apart, size_t rows, const Matrix& matrix, size_t begin, size_t end, const float* y,
                  float* out, size_t out_apart) {
  using Float = typename Isa::Float;
  constexpr size_t kVectors = 2, kWidth = kVectors * Isa::kLanes;
  for (size_t index = 0; index < matrix.rows; ++index)
    ask_for_all<Isa>(matrix.values + index * matrix.columns + begin, end - begin);
  for (size_t column = begin; column < end; column += kWidth) {
    const size_t width = std::min(kWidth, end - column);
    in_groups<4>(rows, [&](size_t row, auto some) {
      constexpr size_t group = some;
      Float sums[group][kVectors];
      for (size_t i = 0; i < group; ++i) {
        for (size_t vector = 0; vector < kVectors; ++vector) {
          sums[i][vector] = load_part<Isa>(y + (row + i) * out_apart + column, vector * Isa::kLanes, width);
        }
      }
      for (size_t index = 0; index < matrix.rows; ++index) {
        Float values[kVectors];
        for (size_t vector = 0; vector < kVectors; ++vector) {
          values[vector] = load_part<Isa>(matrix.values + index * matrix.columns + column, vector * Isa::kLanes, width);
        }
        for (size_t i = 0; i < group; ++i) {
          const Float factor = Isa::broadcast(x[(row + i) * apart + index]);
          for (size_t vector = 0; vector < kVectors; ++vector)
            sums[i][vector] = Isa::add_product(sums[i][vector], factor, values[vector]);
        }
      }
      for (size_t i = 0; i < group; ++i) {
        alignas(64) float written[kWidth];
        for (size_t vector = 0; vector < kVectors; ++vector) Isa::store(written + vector * Isa::kLanes, sums[i][vector]);
        std::memcpy(out + (row + i) * out_apart + column, written, width * sizeof(float));
      }
    });
  }
}

}  // namespace
}  // namespace edgelora
