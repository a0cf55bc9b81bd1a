// AVX2, which multiplies bytes in pairs and adds those in 16 bits.
#include "avx256.h"

namespace edgelora {
namespace {

// Sums stay in 16 bits as long as they fit: with 4 bits, 8 times 2 * 15 * 127.
struct PairsOfBytes {
  static constexpr bool kSigned8 = true;  // with unsigned codes of 8 bits, sums of 16 bits would overflow

  template <int Bits>
  static __m256i multiply(const TwoChunks& weights, const TwoChunks& activations) {
    if constexpr (Bits == 4) {
      return _mm256_add_epi16(_mm256_maddubs_epi16(weights.first, activations.first),
                              _mm256_maddubs_epi16(weights.second, activations.second));
    }
    return _mm256_add_epi32(add_pairs(multiply_signed(weights.first, activations.first)),
                            add_pairs(multiply_signed(weights.second, activations.second)));
  }
  template <int Bits>
  static __m256i add(__m256i a, __m256i b) {
    return Bits == 4 ? _mm256_add_epi16(a, b) : _mm256_add_epi32(a, b);
  }
  template <int Bits>
  static __m256i finish(__m256i sums) {
    return Bits == 4 ? add_pairs(sums) : sums;
  }

  static __m256i begin(__m256i) { return _mm256_setzero_si256(); }
  template <int Bits>
  static __m256i add_products(__m256i sum, __m256i weights, __m256i four) {
    if constexpr (Bits == 4) return _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, four));
    return _mm256_add_epi32(sum, add_pairs(multiply_signed(weights, four)));
  }
  template <int Bits>
  static __m256i end(__m256i sum, __m256i offset) {
    return _mm256_add_epi32(finish<Bits>(sum), offset);
  }

 private:
  // Sums of two neighbouring products of codes and bytes, in 16 bits; the instruction needs one unsigned operand.
  static __m256i multiply_signed(__m256i codes, __m256i bytes) {
    const __m256i weights = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
    return _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(bytes, weights));
  }
};

}  // namespace

extern const Kernels kAvx2;
const Kernels kAvx2 = list_kernels<Avx256<PairsOfBytes>>("avx2");

}  // namespace edgelora
