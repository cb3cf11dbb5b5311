#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastgan::cpu {
namespace {

constexpr const char* kNames[kIsaCount] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)
// Linux hands out the 8 KiB of tile registers only to processes that ask (arch_prctl ARCH_REQ_XCOMP_PERM).
bool request_amx_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool detect_amx() {
  // __builtin_cpu_supports of GCC 12 does not know AMX: CPUID leaf 7, EDX bits 22 (bf16) and 24 (tile).
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return (d >> 22 & 1) && (d >> 24 & 1) && request_amx_tiles();
}
#endif

bool detect(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::baseline: return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    case Isa::avx512:
      return detect(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::avx512_bf16: return detect(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
    case Isa::amx: return detect(Isa::avx512_bf16) && detect_amx();
  }
  return false;
#else
  return isa == Isa::baseline;
#endif
}

Isa choose() {
  const char* wanted = std::getenv("FASTGAN_CPU_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    for (int i = 0; i < kIsaCount; ++i) {
      if (std::strcmp(wanted, kNames[i]) != 0) continue;
      if (isa_available(static_cast<Isa>(i))) return static_cast<Isa>(i);
      throw std::runtime_error(std::string("FASTGAN_CPU_ISA: this machine has no ") + wanted);
    }
    throw std::runtime_error(
        std::string("FASTGAN_CPU_ISA must be one of baseline, avx2, avx512, avx512_bf16, amx, got ") + wanted);
  }
  for (int i = kIsaCount - 1; i > 0; --i)
    if (isa_available(static_cast<Isa>(i))) return static_cast<Isa>(i);
  return Isa::baseline;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_available(Isa isa) {
  static const struct Table {
    bool available[kIsaCount];
    Table() {
      for (int i = 0; i < kIsaCount; ++i) available[i] = detect(static_cast<Isa>(i));
    }
  } table;
  return table.available[static_cast<int>(isa)];
}

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace fastgan::cpu
