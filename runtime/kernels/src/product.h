// The operands of products: weights of 4 or 8 bits and rounded activations.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgelora {

constexpr size_t kChunk = 32;  // activations that share a scale; a block of weights is one chunk or several

// Weights as MatMulNBits stores them: codes (columns, blocks, block * bits / 8), scales (columns, blocks).
// https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
struct Weights {
  const uint8_t* codes;
  const float* scales;
  const uint8_t* zero_points;  // (columns, blocks * bits rounded up to bytes); null: all are 2^(bits - 1)
  const float* bias;           // (columns), or null
  size_t columns;
  size_t inner;  // length of a row of activations
  size_t blocks;
  size_t block;
  int bits;

  size_t chunks() const { return blocks * block / kChunk; }
  size_t chunk_bytes() const { return kChunk * bits / 8; }
  int zero_point(size_t column, size_t index) const {
    if (zero_points == nullptr) return 1 << (bits - 1);
    if (bits == 8) return zero_points[column * blocks + index];
    const uint8_t pair = zero_points[column * ((blocks + 1) / 2) + index / 2];
    return index % 2 ? pair >> 4 : pair & 15;
  }
};

// Rows of activations, each chunk rounded to 8 bits: value ≈ scale * code. The codes of a chunk have the order of the weights
// that they are multiplied with: in order for 8 bits; for 4 bits, two to a byte, those at even places before those at odd ones.
struct Activations {
  int8_t* codes;  // (rows, chunks * kChunk)
  float* scales;  // (rows, chunks)
  // (rows, chunks): what the zero point adds to a chunk's product; minus the sum of the codes if zero points vary.
  int32_t* offsets;
};

}  // namespace edgelora
