// Rows of words turned into columns, so that vectors hold the same place of neighbouring rows; and rows in groups.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace edgelora {
namespace {  // each instruction set's file is compiled with flags of its own: none may get another's instantiation

template <typename Isa>
constexpr size_t kColumns = Isa::kLanes * Isa::kVectors;  // of a tile

// The same place of all columns of a tile.
template <typename Isa>
struct alignas(64) Place {
  uint32_t word[kColumns<Isa>];
};

template <typename Isa>
using Tile = std::vector<Place<Isa>>;

// Turns (columns, words) into a tile of as many places as words; columns behind the last are zeros. Rows are read across, which
// no hardware foresees: so many lines from next on are asked for with every vector, in their order in memory.
template <typename Isa>
void turn(const uint32_t* from, size_t columns, size_t words, const uint32_t* next, size_t lines, Tile<Isa>& to) {
  constexpr size_t kLanes = Isa::kLanes;
  to.resize(words);
  size_t word = 0;
  if (columns == kColumns<Isa>) {
    for (; word + kLanes <= words; word += kLanes) {
      for (size_t lane = 0; lane < kColumns<Isa>; lane += kLanes) {
        for (size_t line = 0; line < lines; ++line, next += 16) Isa::ask_for(next);
        Isa::turn(from + lane * words + word, words, to[word].word + lane, kColumns<Isa>);
      }
    }
  }
  for (; word < words; ++word) {
    for (size_t lane = 0; lane < kColumns<Isa>; ++lane) to[word].word[lane] = lane < columns ? from[lane * words + word] : 0;
  }
}

// work(first row, how many as a constant) for all rows: Most at a time, then those that are left.
template <size_t Most, typename Work>
void in_groups(size_t rows, const Work& work, size_t row = 0) {
  if constexpr (Most > 0) {
    for (; row + Most <= rows; row += Most) work(row, std::integral_constant<size_t, Most>{});
    in_groups<Most - 1>(rows, work, row);
  }
}

}  // namespace
}  // namespace edgelora
