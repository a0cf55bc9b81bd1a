// Attention for an instruction set Isa, a struct that the source file of each set defines.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "attention.h"
#include "row_kernels.h"

namespace edgelora {
namespace {  // see tile.h

// Scores (rows, kSpan) of Rows queries with the keys of a tile. prefetched: values to prefetch meanwhile, or null.
template <typename Isa, size_t Rows>
void score(const Tile<Isa>& keys, const float* queries, size_t size, const float* prefetched, float* scores) {
  using Float = typename Isa::Float;
  constexpr size_t kVectors = Isa::kVectors, kLanes = Isa::kLanes;
  Float sums[Rows][kVectors];
  for (auto& row : sums)
    for (Float& sum : row) sum = Isa::zero();
  for (size_t place = 0; place < size; ++place) {
    if (prefetched) {
      for (size_t line = 0; line < kColumns<Isa> / 16; ++line, prefetched += 16) Isa::prefetch(prefetched);
    }
    Float key[kVectors];
    for (size_t vector = 0; vector < kVectors; ++vector) key[vector] = Isa::load_floats(keys[place].word + vector * kLanes);
    for (size_t row = 0; row < Rows; ++row) {
      const Float query = Isa::broadcast(queries[row * size + place]);
      for (size_t vector = 0; vector < kVectors; ++vector)
        sums[row][vector] = Isa::add_product(sums[row][vector], query, key[vector]);
    }
  }
  for (size_t row = 0; row < Rows; ++row) {
    for (size_t vector = 0; vector < kVectors; ++vector) Isa::store(scores + row * kSpan + vector * kLanes, sums[row][vector]);
  }
}

// Some vectors of Rows weighted sums of values; weights (rows, kSpan).
template <typename Isa, size_t Rows, size_t Vectors>
void weigh(const float* values, size_t count, size_t size, const float* weights, float* sums) {
  using Float = typename Isa::Float;
  Float found[Rows][Vectors];
  for (auto& row : found)
    for (Float& sum : row) sum = Isa::zero();
  for (size_t index = 0; index < count; ++index, values += size) {
    Float value[Vectors];
    for (size_t vector = 0; vector < Vectors; ++vector) value[vector] = Isa::load(values + vector * Isa::kLanes);
    for (size_t row = 0; row < Rows; ++row) {
      const Float weight = Isa::broadcast(weights[row * kSpan + index]);
      for (size_t vector = 0; vector < Vectors; ++vector)
        found[row][vector] = Isa::add_product(found[row][vector], weight, value[vector]);
    }
  }
  for (size_t row = 0; row < Rows; ++row) {
    for (size_t vector = 0; vector < Vectors; ++vector) Isa::store(sums + row * size + vector * Isa::kLanes, found[row][vector]);
  }
}

// Scores become cap * tanh(score / cap), with tanh(y) = 1 - 2 / (exp(2 y) + 1).
template <typename Isa>
void cap(float* scores, size_t count, float cap) {
  const auto one = Isa::broadcast(1.0f), most = Isa::broadcast(88.0f);
  for (size_t index = 0; index < count; index += Isa::kLanes) {
    const auto twice = Isa::multiply(Isa::load(scores + index), Isa::broadcast(2.0f / cap));
    const auto below = Isa::divide(Isa::broadcast(-2.0f), Isa::add(exponential<Isa>(Isa::min(twice, most)), one));
    Isa::store(scores + index, Isa::multiply(Isa::add(one, below), Isa::broadcast(cap)));
  }
}

// Of count scores, those from low to high become exp(score - maximum), the others 0. Returns the sum.
template <typename Isa>
float exponentiate(float* scores, size_t low, size_t high, size_t count, float& maximum) {
  using Float = typename Isa::Float;
  constexpr size_t kLanes = Isa::kLanes;
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  const size_t end = (count + kLanes - 1) / kLanes * kLanes;
  maximum = kLowest;
  if (low >= high) {
    std::fill(scores, scores + end, 0.0f);
    return 0;
  }
  std::fill(scores, scores + low, kLowest);
  std::fill(scores + high, scores + end, kLowest);
  Float most = Isa::load(scores);
  for (size_t index = kLanes; index < end; index += kLanes) most = Isa::max(most, Isa::load(scores + index));
  maximum = Isa::reduce_max(most);
  Float sum = Isa::zero();
  for (size_t index = 0; index < end; index += kLanes) {
    const Float weight = exponential<Isa>(Isa::add(Isa::load(scores + index), Isa::broadcast(-maximum)));
    Isa::store(scores + index, weight);
    sum = Isa::add(sum, weight);
  }
  std::fill(scores, scores + low, 0.0f);
  std::fill(scores + high, scores + end, 0.0f);
  return Isa::reduce_sum(sum);
}

template <typename Isa>
void attend(const Head& head, const Queries& queries, size_t begin, size_t end, const PartialSoftmax& partial) {
  static thread_local Tile<Isa> keys;  // the thread's next span reuses the memory
  static thread_local std::vector<float> scores;
  const size_t rows = queries.rows, size = head.size, count = end - begin;
  if (scores.size() < rows * kSpan) scores.resize(rows * kSpan);
  for (size_t at = begin; at < end; at += kColumns<Isa>) {
    const auto* read = reinterpret_cast<const uint32_t*>(head.keys + at * size);
    const auto* next = at + kColumns<Isa> < end ? read + kColumns<Isa> * size : nullptr;
    transpose<Isa>(read, std::min(kColumns<Isa>, head.capacity - at), size, keys, next);
    in_groups<Isa::kRows>(rows, [&](size_t row, auto group) {
      const float* prefetched = row == 0 ? head.values + at * size : nullptr;
      score<Isa, group>(keys, queries.values + row * size, size, prefetched, scores.data() + row * kSpan + (at - begin));
    });
  }
  for (size_t row = 0; row < rows; ++row) {
    const size_t seen = queries.position(row) + 1, low = head.window && seen > head.window ? seen - head.window : 0;
    const auto within = [&](size_t position) { return std::min(std::max(position, begin) - begin, count); };
    if (head.cap > 0) cap<Isa>(scores.data() + row * kSpan, count, head.cap);
    partial.sums[row] = exponentiate<Isa>(scores.data() + row * kSpan, within(low), within(seen), count, partial.maxima[row]);
  }
  const float* values = head.values + begin * size;
  in_groups<Isa::kRows>(rows, [&](size_t row, auto group) {
    size_t place = 0;
    for (; place + kColumns<Isa> <= size; place += kColumns<Isa>) {
      weigh<Isa, group, Isa::kVectors>(values + place, count, size, scores.data() + row * kSpan,
                                       partial.values + row * size + place);
    }
    for (; place < size; place += Isa::kLanes) {
      weigh<Isa, group, 1>(values + place, count, size, scores.data() + row * kSpan, partial.values + row * size + place);
    }
  });
}

template <typename Isa>
void merge_partials(size_t size, size_t rows, const PartialSoftmax& sum, const PartialSoftmax& other) {
  for (size_t row = 0; row < rows; ++row) {
    if (other.sums[row] == 0) continue;
    const float maximum = std::max(sum.maxima[row], other.maxima[row]);
    const auto old_factor = exponential<Isa>(Isa::broadcast(sum.maxima[row] - maximum));
    const auto new_factor = exponential<Isa>(Isa::broadcast(other.maxima[row] - maximum));
    float* values = sum.values + row * size;
    for (size_t place = 0; place < size; place += Isa::kLanes) {
      const auto added = Isa::multiply(Isa::load(other.values + row * size + place), new_factor);
      Isa::store(values + place, Isa::add_product(added, Isa::load(values + place), old_factor));
    }
    sum.sums[row] = sum.sums[row] * Isa::first(old_factor) + other.sums[row] * Isa::first(new_factor);
    sum.maxima[row] = maximum;
  }
}

}  // namespace
}  // namespace edgelora
