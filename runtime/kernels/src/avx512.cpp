// AVX-512 with VNNI: 16 columns, and four chunks of each, at a time.
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
  static constexpr size_t kLanes = 16, kVectors = 2, kChunksAtOnce = 4, kRows = 6, kFactorRows = 4;
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
    return reduce_max(_mm512_max_ps(_mm512_abs_ps(load(values)), _mm512_abs_ps(load(values + 16))));
  }
  // Rounds a chunk of values times a factor to codes, and returns their sum.
  template <int Bits>
  static int32_t round(const float* values, float factor, int8_t* codes) {
    Float first = load(values), second = load(values + 16);
    if constexpr (Bits == 4) {
      const Int even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      const Float all = first;
      first = _mm512_permutex2var_ps(all, even, second);
      second = _mm512_permutex2var_ps(all, _mm512_add_epi32(even, _mm512_set1_epi32(1)), second);
    }
    const Int low = _mm512_cvtps_epi32(multiply(first, broadcast(factor)));
    const Int high = _mm512_cvtps_epi32(multiply(second, broadcast(factor)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(low));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16), _mm512_cvtepi32_epi8(high));
    return _mm512_reduce_add_epi32(add(low, high));
  }

  // Transposes 16 rows of 4 words, `apart` words from each other, into 4 vectors.
  static void transpose(const uint32_t* from, size_t apart, uint32_t* to, size_t to_apart) {
    const auto read = [&](size_t row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + row * apart)); };
    const auto read_every_fourth = [&](size_t row) {
      __m512i rows = _mm512_castsi128_si512(read(row));
      rows = _mm512_mask_broadcast_i32x4(rows, 0x00f0, read(row + 4));
      rows = _mm512_mask_broadcast_i32x4(rows, 0x0f00, read(row + 8));
      return _mm512_mask_broadcast_i32x4(rows, 0xf000, read(row + 12));
    };
    const __m512i row0 = read_every_fourth(0), row1 = read_every_fourth(1);
    const __m512i row2 = read_every_fourth(2), row3 = read_every_fourth(3);
    const __m512i low01 = _mm512_unpacklo_epi32(row0, row1), high01 = _mm512_unpackhi_epi32(row0, row1);
    const __m512i low23 = _mm512_unpacklo_epi32(row2, row3), high23 = _mm512_unpackhi_epi32(row2, row3);
    _mm512_storeu_si512(to, _mm512_unpacklo_epi64(low01, low23));
    _mm512_storeu_si512(to + to_apart, _mm512_unpackhi_epi64(low01, low23));
    _mm512_storeu_si512(to + 2 * to_apart, _mm512_unpacklo_epi64(high01, high23));
    _mm512_storeu_si512(to + 3 * to_apart, _mm512_unpackhi_epi64(high01, high23));
  }

  // The products of up to four chunks with 16 columns, `apart` bytes from each other: of the first chunk, then of the next ones.
  template <int Bits, size_t Count>
  static void multiply_chunks(const uint8_t* codes, size_t apart, const int8_t* activation_codes, Int* sums) {
    const Halves activations = read_chunks<8, Count>(reinterpret_cast<const uint8_t*>(activation_codes));
    Int fours[4];
    for (size_t four = 0; four < 4; ++four) {
      Int products[4];
      for (size_t lane = 0; lane < 4; ++lane) {
        const Halves weights = read_chunks<Bits, Count>(codes + (4 * four + lane) * apart);
        const Int first = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights.first, activations.first);
        products[lane] = _mm512_dpbusd_epi32(first, weights.second, activations.second);
      }
      const auto add_pairs = [](Int a, Int b) { return add(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)); };
      const Int low = add_pairs(products[0], products[1]), high = add_pairs(products[2], products[3]);
      fours[four] = add(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
    }
    // Each has a chunk of four columns in each quarter.
    const Int even01 = _mm512_shuffle_i32x4(fours[0], fours[1], 0x88), even23 = _mm512_shuffle_i32x4(fours[2], fours[3], 0x88);
    sums[0] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    if constexpr (Count > 2) sums[2] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
    if constexpr (Count == 1) return;
    const Int odd01 = _mm512_shuffle_i32x4(fours[0], fours[1], 0xdd), odd23 = _mm512_shuffle_i32x4(fours[2], fours[3], 0xdd);
    sums[1] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    if constexpr (Count > 3) sums[3] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
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
  // The codes of up to four chunks, one in each quarter; `first` has the half of each that the first half of the activations is
  // multiplied with.
  struct Halves {
    __m512i first, second;
  };
  template <int Bits, size_t Count>
  static Halves read_chunks(const uint8_t* codes) {
    const auto read = [](const uint8_t* at, size_t bytes) {
      return bytes < 64 ? _mm512_maskz_loadu_epi32(first(bytes / 4), at) : _mm512_loadu_si512(at);
    };
    constexpr size_t kBytes = Count * kChunk * Bits / 8;
    if constexpr (Bits == 8) {
      const Int low = read(codes, std::min(kBytes, size_t{64}));
      const Int high = kBytes > 64 ? read(codes + 64, kBytes - 64) : _mm512_setzero_si512();
      return {_mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13), high),
              _mm512_permutex2var_epi64(low, _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15), high)};
    }
    const Int all = read(codes, kBytes), mask = _mm512_set1_epi8(15);
    return {_mm512_and_si512(all, mask), _mm512_and_si512(_mm512_srli_epi16(all, 4), mask)};
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
