// Transposed tiles, in which a vector holds the same place of neighbouring rows; and loops over rows in groups.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace edgelora {
namespace {  // each instruction set has its own compiler flags, so its instantiations must not be shared with another's

template <typename Isa>
constexpr size_t kColumns = Isa::kLanes * Isa::kVectors;  // of a tile

// One place of all columns of a tile.
template <typename Isa>
struct alignas(64) Place {
  uint32_t word[kColumns<Isa>];
};

template <typename Isa>
using Tile = std::vector<Place<Isa>>;

// Transposes (columns, words) into a tile with a place for each word; missing columns are zeros. Meanwhile prefetches as many
// bytes from `next` on, unless it is null: this reads across columns, which the hardware cannot predict.
template <typename Isa>
void transpose(const uint32_t* from, size_t columns, size_t words, Tile<Isa>& to, const uint32_t* next = nullptr) {
  constexpr size_t kLanes = Isa::kLanes;
  to.resize(words);
  size_t word = 0;
  if (columns == kColumns<Isa>) {
    for (; word + 4 <= words; word += 4) {
      for (size_t lane = 0; lane < kColumns<Isa>; lane += kLanes) {
        for (size_t line = 0; next && line < kLanes * 4; line += 16, next += 16) Isa::prefetch(next);
        Isa::transpose(from + lane * words + word, words, to[word].word + lane, kColumns<Isa>);
      }
    }
  }
  for (; word < words; ++word) {
    for (size_t lane = 0; lane < kColumns<Isa>; ++lane) to[word].word[lane] = lane < columns ? from[lane * words + word] : 0;
  }
}

// Calls work(first row, count as a constant) for all rows: Max at a time, then the rest.
template <size_t Max, typename Work>
void in_groups(size_t rows, const Work& work, size_t row = 0) {
  if constexpr (Max > 0) {
    for (; row + Max <= rows; row += Max) work(row, std::integral_constant<size_t, Max>{});
    in_groups<Max - 1>(rows, work, row);
  }
}

}  // namespace
}  // namespace edgelora
