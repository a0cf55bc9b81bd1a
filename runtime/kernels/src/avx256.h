// Instruction sets of 256 bits: 8 columns, or two chunks, at a time. Dot: how they multiply bytes.
#pragma once

#include <immintrin.h>

#include "attention_kernels.h"
#include "kernels.h"
#include "low_rank_kernels.h"
#include "product_kernels.h"

namespace edgelora {
namespace {  // see tile.h

inline __m256i add_pairs(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

// Bytes of 16 in each half.
inline __m256i join(const void* low, const void* high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(low))),
                                 _mm_loadu_si128(static_cast<const __m128i*>(high)), 1);
}

// The codes of two chunks of a column; `first` has the half of each that the first half of the activations is multiplied with.
struct TwoChunks {
  __m256i first, second;
};

template <int Bits, size_t Count>
TwoChunks read_chunks(const uint8_t* codes) {
  const auto read = [](const uint8_t* at) {
    return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  };
  if constexpr (Bits == 8) {
    if constexpr (Count == 1) return {read(codes), read(codes + kChunk / 2)};
    return {join(codes, codes + kChunk), join(codes + kChunk / 2, codes + kChunk + kChunk / 2)};
  }
  // GCC 12 copies what loadu loads through the stack.
  const __m256i two = Count == 1 ? read(codes) : _mm256_lddqu_si256(reinterpret_cast<const __m256i*>(codes));
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(two, mask), _mm256_and_si256(_mm256_srli_epi16(two, 4), mask)};
}

template <typename Dot>
struct Avx256 {
  using Float = __m256;
  using Int = __m256i;
  static constexpr size_t kLanes = 8, kVectors = 2, kChunksAtOnce = 2, kRows = 4, kFactorRows = 2;
  static constexpr bool kSigned8 = Dot::kSigned8;

  static void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T1); }
  static Float zero() { return _mm256_setzero_ps(); }
  static Int load(const uint32_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
  static Float load_floats(const uint32_t* at) { return _mm256_castsi256_ps(load(at)); }
  static void store(float* at, Float value) { _mm256_storeu_ps(at, value); }
  static Float broadcast(float value) { return _mm256_set1_ps(value); }
  static Int broadcast(int32_t value) { return _mm256_set1_epi32(value); }
  static Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Int multiply(Int a, Int b) { return _mm256_mullo_epi32(a, b); }
  static Float add_product(Float sum, Float a, Float b) { return _mm256_fmadd_ps(a, b, sum); }
  static Float load(const float* at) { return _mm256_loadu_ps(at); }
  static Float load(const Half* at) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float divide(Float a, Float b) { return _mm256_div_ps(a, b); }
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
  static Float round_nearest(Float value) { return _mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Float times_power_of_two(Float value, Float exponent) {
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(value, _mm256_castsi256_ps(bits));
  }
  static float first(Float value) { return _mm256_cvtss_f32(value); }
  static float reduce_max(Float value) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
  }
  static float reduce_sum(Float value) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }

  // The first `count` values of an array, padded with zeros.
  static Float load(const float* at, size_t count) { return _mm256_maskload_ps(at, first(count)); }

  static float max_abs(const float* values) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 most = zero();
    for (size_t i = 0; i < kChunk; i += 8) most = _mm256_max_ps(most, _mm256_andnot_ps(sign, _mm256_loadu_ps(values + i)));
    return reduce_max(most);
  }
  // Rounds a chunk of values times a factor to codes, and returns their sum.
  template <int Bits>
  static int32_t round(const float* values, float factor, int8_t* codes) {
    const auto eight = [&](size_t at) { return _mm256_cvtps_epi32(multiply(load(values + at), broadcast(factor))); };
    // Packing works within halves: the first one gets values 0 to 3 of each eight, the second one values 4 to 7.
    const Int all = _mm256_packs_epi16(_mm256_packs_epi32(eight(0), eight(8)), _mm256_packs_epi32(eight(16), eight(24)));
    Int ordered = _mm256_permutevar8x32_epi32(all, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    if constexpr (Bits == 4) {
      const Int even_first = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,  //
                                              0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
      ordered = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(ordered, even_first), 0xd8);
    }
    _mm256_storeu_si256(reinterpret_cast<Int*>(codes), ordered);
    const Int pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), ordered), fours = add_pairs(pairs);
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
  }

  // Transposes 8 rows of 4 words, `apart` words from each other, into 4 vectors.
  static void transpose(const uint32_t* from, size_t apart, uint32_t* to, size_t to_apart) {
    const auto read_every_fourth = [&](size_t row) { return join(from + row * apart, from + (row + 4) * apart); };
    const __m256i row0 = read_every_fourth(0), row1 = read_every_fourth(1);
    const __m256i row2 = read_every_fourth(2), row3 = read_every_fourth(3);
    const __m256i low01 = _mm256_unpacklo_epi32(row0, row1), high01 = _mm256_unpackhi_epi32(row0, row1);
    const __m256i low23 = _mm256_unpacklo_epi32(row2, row3), high23 = _mm256_unpackhi_epi32(row2, row3);
    store_words(to, _mm256_unpacklo_epi64(low01, low23));
    store_words(to + to_apart, _mm256_unpackhi_epi64(low01, low23));
    store_words(to + 2 * to_apart, _mm256_unpacklo_epi64(high01, high23));
    store_words(to + 3 * to_apart, _mm256_unpackhi_epi64(high01, high23));
  }

  // The products of one or two chunks with 8 columns, `apart` bytes from each other: of the first chunk, then of the second one.
  template <int Bits, size_t Count>
  static void multiply_chunks(const uint8_t* codes, size_t apart, const int8_t* activation_codes, Int* sums) {
    const TwoChunks activations = read_chunks<8, Count>(reinterpret_cast<const uint8_t*>(activation_codes));
    const auto two_columns = [&](size_t lane) {
      const Int one = Dot::template multiply<Bits>(read_chunks<Bits, Count>(codes + lane * apart), activations);
      const Int other = Dot::template multiply<Bits>(read_chunks<Bits, Count>(codes + (lane + 1) * apart), activations);
      return Dot::template add<Bits>(_mm256_unpacklo_epi32(one, other), _mm256_unpackhi_epi32(one, other));
    };
    const auto four_columns = [&](size_t lane) {
      const Int one = two_columns(lane), other = two_columns(lane + 2);
      return Dot::template finish<Bits>(
          Dot::template add<Bits>(_mm256_unpacklo_epi64(one, other), _mm256_unpackhi_epi64(one, other)));
    };
    const Int low = four_columns(0), high = four_columns(4);
    sums[0] = _mm256_permute2x128_si256(low, high, 0x20);
    sums[1] = _mm256_permute2x128_si256(low, high, 0x31);
  }
  static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static Float to_float(Int value) { return _mm256_cvtepi32_ps(value); }

  static Int begin(Int offset) { return Dot::begin(offset); }
  template <int Bits>
  static Int part(Int read, size_t index) {
    if constexpr (Bits == 8) return read;
    return _mm256_and_si256(index ? _mm256_srli_epi32(read, 4) : read, _mm256_set1_epi8(15));
  }
  template <int Bits>
  static Int add_products(Int sum, Int weights, Int four) {
    return Dot::template add_products<Bits>(sum, weights, four);
  }
  template <int Bits>
  static Float end(Int sum, Int offset) {
    return _mm256_cvtepi32_ps(Dot::template end<Bits>(sum, offset));
  }

 private:
  static __m256i first(size_t count) {
    return _mm256_cmpgt_epi32(broadcast(static_cast<int32_t>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static void store_words(uint32_t* at, Int value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), value); }
};

// The functions of an instruction set.
template <typename Isa>
constexpr Kernels list_kernels(const char* name) {
  return {
      name,      kColumns<Isa>, round<Isa>,          multiply_row<Isa>,   multiply_rows<Isa>, normalize<Isa>,
      gate<Isa>, attend<Isa>,   merge_partials<Isa>, prefetch_range<Isa>, multiply_down<Isa>, add_up<Isa>,
  };
}

}  // namespace
}  // namespace edgelora
