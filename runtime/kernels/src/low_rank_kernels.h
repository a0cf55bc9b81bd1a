// Products with low-rank factors for an instruction set Isa, a struct that the source file of each set defines.
#pragma once

#include <algorithm>

#include "low_rank.h"
#include "tile.h"

namespace edgelora {
namespace {  // see tile.h

template <typename Isa>
void prefetch_range(const void* from, size_t bytes) {
  for (size_t place = 0; place < bytes; place += 64) Isa::prefetch(static_cast<const char*>(from) + place);
}

// Rows begin … end of A times `rows` rows of x, scaled by the weights; out (rows, rows of A).
template <typename Isa>
void multiply_down(const Factors& factors, const float* x, size_t rows, size_t begin, size_t end, float* out) {
  using Float = typename Isa::Float;
  const size_t inner = factors.inner, apart = count_groups(inner) * kGroup, whole = inner / Isa::kLanes * Isa::kLanes;
  in_groups<4>(end - begin, [&](size_t first, auto many) {
    constexpr size_t dots = many;
    const Half* read = factors.a + (begin + first) * apart;
    in_groups<Isa::kFactorRows>(rows, [&](size_t row, auto some) {
      constexpr size_t group = some;
      Float sums[group][dots];
      for (auto& row_sums : sums)
        for (Float& sum : row_sums) sum = Isa::zero();
      const auto add = [&](size_t place, const auto& load) {
        Float values[dots];
        for (size_t dot = 0; dot < dots; ++dot) values[dot] = Isa::load(read + dot * apart + place);
        for (size_t i = 0; i < group; ++i) {
          const Float value = load(x + (row + i) * inner + place);
          for (size_t dot = 0; dot < dots; ++dot) sums[i][dot] = Isa::add_product(sums[i][dot], value, values[dot]);
        }
      };
      for (size_t place = 0; place < whole; place += Isa::kLanes) add(place, [](const float* at) { return Isa::load(at); });
      if (whole < inner) add(whole, [&](const float* at) { return Isa::load(at, inner - whole); });
      for (size_t i = 0; i < group; ++i) {
        for (size_t dot = 0; dot < dots; ++dot) {
          const size_t index = begin + first + dot;
          out[(row + i) * factors.rows() + index] = Isa::reduce_sum(sums[i][dot]) * factors.weights[index];
        }
      }
    });
  });
}

// Adds a part's B times the part's columns of down (rows, rows of A) to the part's columns begin … end of out (rows, width of the
// product).
template <typename Isa>
void add_up(const Factors& factors, size_t part, const float* down, size_t rows, size_t begin, size_t end, float* out) {
  using Float = typename Isa::Float;
  constexpr size_t kVectors = kGroup / Isa::kLanes, kAtOnce = 2;
  const size_t rank = factors.rank, apart = factors.starts[factors.parts];
  in_groups<kAtOnce>(
      count_groups(end),
      [&](size_t first, auto many) {
        constexpr size_t vectors = many * kVectors, size = many * kGroup;
        const Half* read = factors.b[part] + first * rank * kGroup;
        const size_t start = first * kGroup, low = std::max(begin, start), high = std::min(end, start + size);
        in_groups<Isa::kFactorRows>(rows, [&](size_t row, auto some) {
          constexpr size_t group = some;
          Float sums[group][vectors];
          for (auto& row_sums : sums)
            for (Float& sum : row_sums) sum = Isa::zero();
          for (size_t index = 0; index < rank; ++index) {
            Float values[vectors];
            for (size_t vector = 0; vector < vectors; ++vector) {
              const size_t place = vector / kVectors * rank * kGroup + vector % kVectors * Isa::kLanes;
              values[vector] = Isa::load(read + place + index * kGroup);
            }
            for (size_t i = 0; i < group; ++i) {
              const Float factor = Isa::broadcast(down[(row + i) * factors.rows() + part * rank + index]);
              for (size_t vector = 0; vector < vectors; ++vector)
                sums[i][vector] = Isa::add_product(sums[i][vector], factor, values[vector]);
            }
          }
          for (size_t i = 0; i < group; ++i) {
            float* written = out + (row + i) * apart + factors.starts[part];
            if (high - low == size) {
              float* to = written + start;
              for (size_t vector = 0; vector < vectors; ++vector, to += Isa::kLanes)
                Isa::store(to, Isa::add(Isa::load(to), sums[i][vector]));
              continue;
            }
            alignas(64) float added[size];
            for (size_t vector = 0; vector < vectors; ++vector) Isa::store(added + vector * Isa::kLanes, sums[i][vector]);
            for (size_t column = low; column < high; ++column) written[column] += added[column - start];
          }
        });
      },
      begin / kGroup);
}

}  // namespace
}  // namespace edgelora
