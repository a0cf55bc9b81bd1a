// Products for an instruction set Isa, a struct that the source file of each set defines.
#pragma once

#include <algorithm>
#include <cstring>

#include "product.h"
#include "tile.h"

namespace edgelora {
namespace {  // see tile.h

// The zero point after an instruction set that needs signed codes of 8 bits has subtracted 128 from them.
template <typename Isa, int Bits>
int32_t recentred_zero_point(int32_t zero_point) {
  return Bits == 8 && Isa::kSigned8 ? zero_point - 128 : zero_point;
}

template <typename Isa, int Bits>
void round_bits(const Weights& weights, const float* row, int8_t* codes, float* scales, int32_t* offsets) {
  const int32_t zero_point = recentred_zero_point<Isa, Bits>(1 << (Bits - 1));
  for (size_t chunk = 0; chunk < weights.chunks(); ++chunk, codes += kChunk) {
    const size_t start = chunk * kChunk;
    const size_t count = start < weights.inner ? std::min(kChunk, weights.inner - start) : 0;
    alignas(64) float padded[kChunk] = {};
    if (count && count < kChunk) std::memcpy(padded, row + start, count * sizeof(float));
    const float* values = count == kChunk ? row + start : padded;
    const float scale = Isa::max_abs(values) / 127.0f;
    const int32_t sum = Isa::template round<Bits>(values, scale > 0 ? 1.0f / scale : 0.0f, codes);
    scales[chunk] = scale;
    offsets[chunk] = weights.zero_points ? -sum : -sum * zero_point;
  }
}

template <typename Isa>
void round(const Weights& weights, const float* row, int8_t* codes, float* scales, int32_t* offsets) {
  (weights.bits == 4 ? round_bits<Isa, 4> : round_bits<Isa, 8>)(weights, row, codes, scales, offsets);
}

// The product of one row with kLanes columns, `apart` columns from each other, from `begin` on; prefetches what follows them. It
// adds in the order of multiply_tile, so that a row gets the same bits whether it is computed alone or with others.
template <typename Isa, int Bits>
typename Isa::Float multiply_columns(const Weights& weights, const Activations& activations, size_t begin, size_t apart) {
  using Int = typename Isa::Int;
  using Float = typename Isa::Float;
  constexpr size_t kAtOnce = Isa::kChunksAtOnce, kLanes = Isa::kLanes, kBytes = kChunk * Bits / 8;
  const size_t chunks = weights.chunks(), per_block = weights.block / kChunk, column_bytes = apart * chunks * kBytes;
  const uint8_t* codes = weights.codes + begin * chunks * kBytes;
  const uint8_t* next_codes = codes + kLanes * column_bytes;
  const float* next_scales = weights.scales + (begin + kLanes * apart) * weights.blocks;
  const int8_t* activation_codes = activations.codes;
  alignas(64) float scales[kLanes][kLanes];  // of some blocks, for all columns
  alignas(64) int32_t zero_points[kLanes][kLanes];
  Float sums = Isa::zero();
  size_t chunk = 0;
  for (size_t block = 0; block < weights.blocks; block += kLanes) {
    const size_t blocks = std::min(kLanes, weights.blocks - block);
    const float* read = weights.scales + begin * weights.blocks + block;
    for (size_t line = 0; line < kLanes * kLanes; line += 16, next_scales += 16) Isa::prefetch(next_scales);
    if (blocks == kLanes) {
      for (size_t index = 0; index < kLanes; index += 4) {
        Isa::transpose(reinterpret_cast<const uint32_t*>(read + index), apart * weights.blocks,
                       reinterpret_cast<uint32_t*>(scales[index]), kLanes);
      }
    } else {
      for (size_t index = 0; index < blocks; ++index)
        for (size_t lane = 0; lane < kLanes; ++lane) scales[index][lane] = read[lane * apart * weights.blocks + index];
    }
    if (weights.zero_points) {
      for (size_t index = 0; index < blocks; ++index) {
        for (size_t lane = 0; lane < kLanes; ++lane)
          zero_points[index][lane] = recentred_zero_point<Isa, Bits>(weights.zero_point(begin + lane * apart, block + index));
      }
    }
    size_t place = 0, left = per_block;  // the block among these, and its chunks that are left
    const auto add_chunk = [&](Int product) {
      Int offset = Isa::broadcast(activations.offsets[chunk]);
      if (weights.zero_points) offset = Isa::multiply(offset, Isa::load(reinterpret_cast<uint32_t*>(zero_points[place])));
      const Float exact = Isa::to_float(Isa::add(product, offset));
      sums = Isa::add_product(sums, Isa::multiply(exact, Isa::broadcast(activations.scales[chunk])), Isa::load(scales[place]));
      ++chunk;
      if (--left == 0) ++place, left = per_block;
    };
    const auto add_chunks = [&](auto group) {
      constexpr size_t count = group;
      for (size_t line = 0; line < kLanes * count * kBytes; line += 64, next_codes += 64) Isa::prefetch(next_codes);
      Int found[kAtOnce];
      Isa::template multiply_chunks<Bits, count>(codes, column_bytes, activation_codes, found);
      codes += count * kBytes;
      activation_codes += count * kChunk;
      for (size_t index = 0; index < count; ++index) add_chunk(found[index]);
    };
    const size_t end = chunk + blocks * per_block;
    while (chunk + kAtOnce <= end) add_chunks(std::integral_constant<size_t, kAtOnce>{});
    in_groups<kAtOnce - 1>(end - chunk, [&](size_t, auto group) { add_chunks(group); });
  }
  return sums;
}

template <typename Isa, int Bits>
void multiply_row_bits(const Weights& weights, const Activations& activations, size_t begin, size_t end, float* out) {
  alignas(64) float values[Isa::kLanes];
  for (size_t column = begin; column < end;) {
    // Fewer columns than lanes at the end: one at a time, in all lanes.
    const size_t columns = end - column < Isa::kLanes ? 1 : Isa::kLanes;
    Isa::store(values, multiply_columns<Isa, Bits>(weights, activations, column, columns == 1 ? 0 : 1));
    for (size_t lane = 0; lane < columns; ++lane, ++column)
      out[column] = values[lane] + (weights.bias ? weights.bias[column] : 0.0f);
  }
}

template <typename Isa>
void multiply_row(const Weights& weights, const Activations& activations, size_t begin, size_t end, float* out) {
  (weights.bits == 4 ? multiply_row_bits<Isa, 4> : multiply_row_bits<Isa, 8>)(weights, activations, begin, end, out);
}

template <typename Isa>
struct WeightTile {
  Tile<Isa> codes, scales, zero_points;
};

template <typename Isa, int Bits>
void lay_out(const Weights& weights, size_t begin, size_t next, WeightTile<Isa>& tile) {
  const size_t columns = std::min(kColumns<Isa>, weights.columns - begin), words = weights.chunks() * kChunk * Bits / 32;
  const auto* scales = reinterpret_cast<const uint32_t*>(weights.scales);
  transpose<Isa>(reinterpret_cast<const uint32_t*>(weights.codes) + begin * words, columns, words, tile.codes);
  transpose<Isa>(scales + begin * weights.blocks, columns, weights.blocks, tile.scales,
                 next > begin ? scales + next * weights.blocks : nullptr);
  if (weights.zero_points == nullptr) return;
  tile.zero_points.resize(weights.blocks);
  for (size_t block = 0; block < weights.blocks; ++block) {
    for (size_t lane = 0; lane < columns; ++lane) {
      tile.zero_points[block].word[lane] =
          static_cast<uint32_t>(recentred_zero_point<Isa, Bits>(weights.zero_point(begin + lane, block)));
    }
  }
}

// Some rows of a tile's product. next: codes to prefetch meanwhile, or null.
template <typename Isa, int Bits, size_t Rows>
void multiply_tile(const Weights& weights, const WeightTile<Isa>& tile, const Activations& activations, size_t first,
                   size_t begin, const uint8_t* next, float* out) {
  using Int = typename Isa::Int;
  using Float = typename Isa::Float;
  constexpr size_t kWords = kChunk * Bits / 32, kVectors = Isa::kVectors, kLanes = Isa::kLanes;
  const size_t chunks = weights.chunks(), per_block = weights.block / kChunk;
  Float sums[Rows][kVectors];
  for (auto& row : sums)
    for (Float& sum : row) sum = Isa::zero();
  for (size_t block = 0, chunk = 0; block < weights.blocks; ++block) {
    for (const size_t end = chunk + per_block; chunk < end; ++chunk) {
      if (next) {
        for (size_t line = 0; line < kColumns<Isa> * kWords * 4; line += 64, next += 64) Isa::prefetch(next);
      }
      const auto offset = [&](size_t row, size_t vector) {
        const Int sum = Isa::broadcast(activations.offsets[(first + row) * chunks + chunk]);
        return weights.zero_points ? Isa::multiply(sum, Isa::load(tile.zero_points[block].word + vector * kLanes)) : sum;
      };
      Int products[Rows][kVectors];
      for (size_t row = 0; row < Rows; ++row) {
        for (size_t vector = 0; vector < kVectors; ++vector) products[row][vector] = Isa::begin(offset(row, vector));
      }
      const int8_t* activation_codes = activations.codes + (first * chunks + chunk) * kChunk;
#pragma GCC unroll 2
      for (size_t word = 0; word < kWords; ++word) {
        const uint32_t* read = tile.codes[chunk * kWords + word].word;
        for (size_t part = 0; part < 8 / Bits; ++part) {
          Int codes[kVectors];
          for (size_t vector = 0; vector < kVectors; ++vector)
            codes[vector] = Isa::template part<Bits>(Isa::load(read + vector * kLanes), part);
          for (size_t row = 0; row < Rows; ++row) {
            int32_t four;
            std::memcpy(&four, activation_codes + row * chunks * kChunk + (part * kWords + word) * 4, 4);
            for (size_t vector = 0; vector < kVectors; ++vector) {
              products[row][vector] =
                  Isa::template add_products<Bits>(products[row][vector], codes[vector], Isa::broadcast(four));
            }
          }
        }
      }
      for (size_t vector = 0; vector < kVectors; ++vector) {
        const Float scale = Isa::load_floats(tile.scales[block].word + vector * kLanes);
        for (size_t row = 0; row < Rows; ++row) {
          const Float product = Isa::template end<Bits>(products[row][vector], offset(row, vector));
          const Float activation_scale = Isa::broadcast(activations.scales[(first + row) * chunks + chunk]);
          sums[row][vector] = Isa::add_product(sums[row][vector], Isa::multiply(product, activation_scale), scale);
        }
      }
    }
  }
  const size_t columns = std::min(kColumns<Isa>, weights.columns - begin);
  for (size_t row = 0; row < Rows; ++row) {
    alignas(64) float values[kColumns<Isa>];
    for (size_t vector = 0; vector < kVectors; ++vector) Isa::store(values + vector * kLanes, sums[row][vector]);
    float* written = out + (first + row) * weights.columns + begin;
    for (size_t lane = 0; lane < columns; ++lane)
      written[lane] = values[lane] + (weights.bias ? weights.bias[begin + lane] : 0.0f);
  }
}

template <typename Isa, int Bits>
void multiply_rows_bits(const Weights& weights, const Activations& activations, size_t rows, size_t begin, size_t next,
                        float* out) {
  static thread_local WeightTile<Isa> tile;  // the thread's next tile reuses the memory
  lay_out<Isa, Bits>(weights, begin, next, tile);
  const uint8_t* codes = next > begin ? weights.codes + next * weights.chunks() * kChunk * Bits / 8 : nullptr;
  in_groups<Isa::kRows>(rows, [&](size_t row, auto group) {
    multiply_tile<Isa, Bits, group>(weights, tile, activations, row, begin, row == 0 ? codes : nullptr, out);
  });
}

template <typename Isa>
void multiply_rows(const Weights& weights, const Activations& activations, size_t rows, size_t begin, size_t next, float* out) {
  (weights.bits == 4 ? multiply_rows_bits<Isa, 4> : multiply_rows_bits<Isa, 8>)(weights, activations, rows, begin, next, out);
}

}  // namespace
}  // namespace edgelora
