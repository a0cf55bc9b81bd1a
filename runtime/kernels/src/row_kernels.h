// Functions of one row of activations for an instruction set Isa, a struct that the source file of each set defines.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "row.h"
#include "tile.h"

namespace edgelora {
namespace {  // see tile.h

// exp(x) for x from -87 (also used for smaller x) to 88: 2^n times the Taylor series of the remainder r, |r| <= ln(2) / 2, up to
// terms below 2^-24.
template <typename Isa>
typename Isa::Float exponential(typename Isa::Float x) {
  using Float = typename Isa::Float;
  x = Isa::max(x, Isa::broadcast(-87.0f));
  const Float n = Isa::round_nearest(Isa::multiply(x, Isa::broadcast(1.44269504f)));
  Float r = Isa::add_product(x, n, Isa::broadcast(-0.693359375f));  // ln(2) in two parts, the first with few bits
  r = Isa::add_product(r, n, Isa::broadcast(2.12194440e-4f));
  Float sum = Isa::broadcast(1.0f / 5040);
  for (const float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    sum = Isa::add_product(Isa::broadcast(factor), sum, r);
  return Isa::times_power_of_two(sum, n);
}

// Calls vector(place) for all whole vectors of a row, then rest(place, count) for the values that are left.
template <typename Isa, typename Vector, typename Rest>
void in_vectors(size_t size, const Vector& vector, const Rest& rest) {
  size_t place = 0;
  for (; place + Isa::kLanes <= size; place += Isa::kLanes) vector(place);
  if (place < size) rest(place, size - place);
}

template <typename Isa>
void store(float* at, size_t count, typename Isa::Float value) {
  alignas(64) float values[Isa::kLanes];
  Isa::store(values, value);
  std::memcpy(at, values, count * sizeof(float));
}

template <typename Isa>
void normalize(const Norm& norm, const float* sum, const float* update, size_t size, float* total, float* normed) {
  using Float = typename Isa::Float;
  Float squares = Isa::zero();
  const auto square = [&](Float value) { return squares = Isa::add_product(squares, value, value), value; };
  in_vectors<Isa>(
      size, [&](size_t at) { Isa::store(total + at, square(Isa::add(Isa::load(sum + at), Isa::load(update + at)))); },
      [&](size_t at, size_t count) {
        store<Isa>(total + at, count, square(Isa::add(Isa::load(sum + at, count), Isa::load(update + at, count))));
      });
  const float mean = Isa::reduce_sum(squares) / static_cast<float>(size);
  const Float factor = Isa::broadcast(1.0f / std::sqrt(mean + norm.epsilon));
  in_vectors<Isa>(
      size,
      [&](size_t at) {
        Isa::store(normed + at, Isa::multiply(Isa::multiply(Isa::load(total + at), factor), Isa::load(norm.weight + at)));
      },
      [&](size_t at, size_t count) {
        const Float scaled = Isa::multiply(Isa::load(total + at, count), factor);
        store<Isa>(normed + at, count, Isa::multiply(scaled, Isa::load(norm.weight + at, count)));
      });
}

template <typename Isa>
void gate(Activation activation, const float* gates, const float* up, size_t size, float* gated) {
  using Float = typename Isa::Float;
  const Float one = Isa::broadcast(1.0f), most = Isa::broadcast(88.0f);
  const auto apply = [&](Float x, Float other) {
    Float z = x;
    if (activation == Activation::kGelu) {  // 2 sqrt(2 / pi) (x + 0.044715 x^3)
      const Float square = Isa::multiply(x, x);
      z = Isa::multiply(x, Isa::add_product(Isa::broadcast(1.59576912f), square, Isa::broadcast(0.0713548163f)));
    }
    const Float below = Isa::add(one, exponential<Isa>(Isa::min(Isa::multiply(z, Isa::broadcast(-1.0f)), most)));
    return Isa::divide(Isa::multiply(x, other), below);
  };
  in_vectors<Isa>(
      size, [&](size_t at) { Isa::store(gated + at, apply(Isa::load(gates + at), Isa::load(up + at))); },
      [&](size_t at, size_t count) {
        store<Isa>(gated + at, count, apply(Isa::load(gates + at, count), Isa::load(up + at, count)));
      });
}

}  // namespace
}  // namespace edgelora
