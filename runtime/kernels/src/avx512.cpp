// AVX-512 with VNNI: 16 columns or two chunks at a time.
#include <immintrin.h>

#include "attention_kernels.h"
#include "kernels.h"
#include "low_rank_kernels.h"
#include "product_kernels.h"

namespace edgelora {
namespace {

struct Avx512 {
  using Float = __m512;
  using Int = __m512i;
  static constexpr size_t kLanes = 16, kVectors = 2, kChunksAtOnce = 2, kRows = 6;
  static constexpr bool kSigned8 = false;

  static void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T1); }
  static Float zero() { return _mm512_setzero_ps(); }
  static Int load(const uint32_t* at) { return _mm512_loadu_si512(at); }
  static Float load_floats(const uint32_t* at) { return _mm512_castsi512_ps(load(at)); }
  static void store(float* at, Float value) { _mm512_storeu_ps(at, value); }
  static Float broadcast(float value) { return _mm512_set1_ps(value); }
  static Int broadcast(int32_t value) { return _mm512_set1_epi32(value); }
  static Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Int multiply(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
  static Float add_product(Float sum, Float a, Float b) { return _mm512_fmadd_ps(a, b, sum); }
  static Float load(const float* at) { return _mm512_loadu_ps(at); }
  static Float load(const Half* at) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float divide(Float a, Float b) { return _mm512_div_ps(a, b); }
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
  static Float round_nearest(Float value) { return _mm512_roundscale_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Float times_power_of_two(Float value, Float exponent) { return _mm512_scalef_ps(value, exponent); }
  static float first(Float value) { return _mm512_cvtss_f32(value); }
  static float reduce_max(Float value) { return _mm512_reduce_max_ps(value); }
  static float reduce_sum(Float value) { return _mm512_reduce_add_ps(value); }

  // The first `count` values of an array, padded with zeros.
  static Float load(const float* at, size_t count) { return _mm512_maskz_loadu_ps(first(count), at); }

  static float max_abs(const float* values) {
    const __m512 first = _mm512_loadu_ps(values), second = _mm512_loadu_ps(values + 16);
    return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(first), _mm512_abs_ps(second)));
  }
  static void round(const float* values, float factor, int32_t* rounded) {
    for (size_t i = 0; i < kChunk; i += 16) {
      _mm512_storeu_si512(rounded + i, _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(values + i), broadcast(factor))));
    }
  }

  // Transposes 16 rows of 16 words, `apart` words from each other: first within quarters of four words, then the quarters.
  static void transpose(const uint32_t* from, size_t apart, uint32_t* to, size_t to_apart) {
    __m512i row[16], pairs[16], fours[16];
    for (size_t i = 0; i < 16; ++i) row[i] = load(from + i * apart);
    for (size_t i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (size_t i = 0; i < 16; i += 4) {
      fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
      fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
      fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
      fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    for (size_t i = 0; i < 4; ++i) {
      const __m512i low02 = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0x88),
                    low13 = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0xdd);
      const __m512i high02 = _mm512_shuffle_i32x4(fours[i + 8], fours[i + 12], 0x88),
                    high13 = _mm512_shuffle_i32x4(fours[i + 8], fours[i + 12], 0xdd);
      _mm512_storeu_si512(to + i * to_apart, _mm512_shuffle_i32x4(low02, high02, 0x88));
      _mm512_storeu_si512(to + (i + 4) * to_apart, _mm512_shuffle_i32x4(low13, high13, 0x88));
      _mm512_storeu_si512(to + (i + 8) * to_apart, _mm512_shuffle_i32x4(low02, high02, 0xdd));
      _mm512_storeu_si512(to + (i + 12) * to_apart, _mm512_shuffle_i32x4(low13, high13, 0xdd));
    }
  }

  // The products of two chunks with 16 columns, `apart` bytes from each other: of the first chunk, then of the second one.
  template <int Bits>
  static void multiply_chunks(const uint8_t* codes, size_t apart, const int8_t* activation_codes, Int* sums) {
    Int products[16];
    for (size_t lane = 0; lane < 16; ++lane) products[lane] = multiply_two<Bits>(codes + lane * apart, activation_codes);
    sum_halves(products, sums);
  }
  static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static Float to_float(Int value) { return _mm512_cvtepi32_ps(value); }

  static Int begin(Int offset) { return offset; }
  template <int Bits>
  static Int part(Int read, size_t index) {
    if constexpr (Bits == 8) return read;
    return _mm512_and_si512(index ? _mm512_srli_epi32(read, 4) : read, _mm512_set1_epi8(15));
  }
  template <int Bits>
  static Int add_products(Int sum, Int weights, Int four) {
    return _mm512_dpbusd_epi32(sum, weights, four);
  }
  template <int Bits>
  static Float end(Int sum, Int) {
    return _mm512_cvtepi32_ps(sum);
  }

 private:
  // Products of two chunks of a column, one in each half.
  template <int Bits>
  static Int multiply_two(const uint8_t* codes, const int8_t* activation_codes) {
    __m512i weights;
    if constexpr (Bits == 8) {
      weights = _mm512_loadu_si512(codes);
    } else {
      const __m512i two = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
      const __m512i twice = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3), two);
      const __m512i shifts = _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4);
      weights = _mm512_and_si512(_mm512_srlv_epi64(twice, shifts), _mm512_set1_epi8(15));
    }
    return _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights, _mm512_loadu_si512(activation_codes));
  }
  // Sums of each half of 16 vectors: of the first halves, then of the second ones.
  static void sum_halves(const Int* products, Int* sums) {
    __m512i pairs[8], fours[4];
    for (size_t i = 0; i < 8; ++i) {
      const Int one = products[2 * i], other = products[2 * i + 1];
      pairs[i] = add(_mm512_unpacklo_epi32(one, other), _mm512_unpackhi_epi32(one, other));
    }
    for (size_t i = 0; i < 4; ++i) {
      const Int one = pairs[2 * i], other = pairs[2 * i + 1];
      fours[i] = add(_mm512_unpacklo_epi64(one, other), _mm512_unpackhi_epi64(one, other));
    }
    const auto fold = [](Int one, Int other) {
      return add(_mm512_shuffle_i32x4(one, other, 0x88), _mm512_shuffle_i32x4(one, other, 0xdd));
    };
    const Int low = fold(fours[0], fours[1]), high = fold(fours[2], fours[3]);
    sums[0] = _mm512_shuffle_i32x4(low, high, 0x88);
    sums[1] = _mm512_shuffle_i32x4(low, high, 0xdd);
  }
  static __mmask16 first(size_t count) { return static_cast<__mmask16>((1u << count) - 1); }
};

}  // namespace

extern const Kernels kAvx512;
const Kernels kAvx512 = {
    "avx512-vnni", kColumns<Avx512>, round<Avx512>,          multiply_row<Avx512>,   multiply_rows<Avx512>, normalize<Avx512>,
    gate<Avx512>,  attend<Avx512>,   merge_partials<Avx512>, prefetch_range<Avx512>, multiply_down<Avx512>, add_up<Avx512>,
};

}  // namespace edgelora
