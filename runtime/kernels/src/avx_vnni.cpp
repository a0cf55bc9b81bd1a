// AVX-VNNI, which multiplies bytes by four and adds those in 32 bits.
#include "avx256.h"

namespace edgelora {
namespace {

struct FourBytes {
  static constexpr bool kSigned8 = false;

  template <int Bits>
  static __m256i multiply(const TwoChunks& weights, const TwoChunks& activations) {
    const __m256i first = _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), weights.first, activations.first);
    return _mm256_dpbusd_avx_epi32(first, weights.second, activations.second);
  }
  template <int Bits>
  static __m256i add(__m256i a, __m256i b) {
    return _mm256_add_epi32(a, b);
  }
  template <int Bits>
  static __m256i finish(__m256i sums) {
    return sums;
  }

  static __m256i begin(__m256i offset) { return offset; }
  template <int Bits>
  static __m256i add_products(__m256i sum, __m256i weights, __m256i four) {
    return _mm256_dpbusd_avx_epi32(sum, weights, four);
  }
  template <int Bits>
  static __m256i end(__m256i sum, __m256i) {
    return sum;
  }
};

}  // namespace

extern const Kernels kAvxVnni;
const Kernels kAvxVnni = list_kernels<Avx256<FourBytes>>("avx-vnni");

}  // namespace edgelora
