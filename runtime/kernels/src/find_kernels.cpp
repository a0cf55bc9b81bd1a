// Chooses the kernels of the machine's best instruction set, or of the one that EDGELORA_INSTRUCTION_SET names.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#define EDGELORA_X86 1
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace edgelora {

#ifdef EDGELORA_X86
extern const Kernels kAvx512;
extern const Kernels kAvxVnni;
extern const Kernels kAvx2;

namespace {

struct Registers {
  uint32_t eax, ebx, ecx, edx;
  bool has(uint32_t Registers::* which, int bit) const { return this->*which >> bit & 1; }
};

Registers ask(uint32_t leaf, uint32_t part = 0) {
  Registers found{};
#if defined(_MSC_VER)
  int values[4];
  __cpuidex(values, static_cast<int>(leaf), static_cast<int>(part));
  found = {uint32_t(values[0]), uint32_t(values[1]), uint32_t(values[2]), uint32_t(values[3])};
#else
  __get_cpuid_count(leaf, part, &found.eax, &found.ebx, &found.ecx, &found.edx);
#endif
  return found;
}

// The registers that the system saves when it switches threads (XCR0).
uint64_t saved_registers() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
#endif
}

}  // namespace

// Bits of the leaves: Intel, Software Developer's Manual, volume 2, CPUID.
const Kernels* find_kernels() {
  const Registers basic = ask(1), extended = ask(7);
  if (!basic.has(&Registers::ecx, 27) || (saved_registers() & 0x6) != 0x6) return nullptr;
  const bool avx2 = extended.has(&Registers::ebx, 5) && basic.has(&Registers::ecx, 12) && basic.has(&Registers::ecx, 29);
  const bool avx512 = extended.has(&Registers::ebx, 16) && extended.has(&Registers::ebx, 30) && extended.has(&Registers::ebx, 31);
  const bool vnni = extended.has(&Registers::ecx, 11);
  const char* wanted = std::getenv("EDGELORA_INSTRUCTION_SET");
  const auto allowed = [wanted](const Kernels& kernels) { return wanted == nullptr || std::strcmp(wanted, kernels.name) == 0; };
  if (avx2 && avx512 && vnni && (saved_registers() & 0xe0) == 0xe0 && allowed(kAvx512)) return &kAvx512;
#ifdef EDGELORA_AVX_VNNI
  if (avx2 && ask(7, 1).has(&Registers::eax, 4) && allowed(kAvxVnni)) return &kAvxVnni;
#endif
  return avx2 && allowed(kAvx2) ? &kAvx2 : nullptr;
}
#else
const Kernels* find_kernels() { return nullptr; }
#endif

}  // namespace edgelora
