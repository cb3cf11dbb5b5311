// Instruction sets and the choice between them.
//
// A file named `*_kernel.cpp` in this folder is compiled once for each instruction set that its first line lists, with
//     -DFASTGAN_ISA=<name> and that set's compiler flags (setup.py and CMakeLists.txt hold the same table),
// and keeps everything it defines inside `namespace fastgan::cpu::FASTGAN_ISA`. Such a file must not
// instantiate templates of the standard library: their code would be emitted with, say, AVX-512
// instructions under a name that every other file shares, and the linker keeps only one copy.
#pragma once

namespace fastgan::cpu {

enum class Isa { baseline = 0, avx2, avx512, avx512_bf16, amx };
constexpr int kIsaCount = 5;

const char* isa_name(Isa isa);

// Compiled into this library and supported by this machine and its operating system.
bool isa_available(Isa isa);

// The one in use: the best available, or what FASTGAN_CPU_ISA (one of the names above) asks for.
// Throws std::runtime_error if FASTGAN_CPU_ISA names an unknown or unavailable set.
Isa active_isa();

}  // namespace fastgan::cpu

// FASTGAN_PER_ISA(void, f, (int n)) declares f, of a file for baseline, avx2 and avx512, in the namespace of every
// instruction set. What avx512_bf16 and amx add are conversions and products of bfloat16; they take avx512's copy.
// FASTGAN_PER_ISA_BF16 is for files that are compiled for avx512_bf16, too.
// FASTGAN_ISA_CALL(f, n) calls the copy for active_isa().
#if defined(__x86_64__)
#define FASTGAN_PER_ISA(ret, name, args)         \
  namespace baseline { ret name args; }          \
  namespace avx2 { ret name args; }              \
  namespace avx512 { ret name args; }            \
  namespace avx512_bf16 { using avx512::name; }  \
  namespace amx { using avx512::name; }
#define FASTGAN_PER_ISA_BF16(ret, name, args)    \
  namespace baseline { ret name args; }          \
  namespace avx2 { ret name args; }              \
  namespace avx512 { ret name args; }            \
  namespace avx512_bf16 { ret name args; }       \
  namespace amx { using avx512_bf16::name; }
#define FASTGAN_ISA_CALL(name, ...)                                                  \
  [&] {                                                                              \
    switch (::fastgan::cpu::active_isa()) {                                          \
      case ::fastgan::cpu::Isa::amx: return amx::name(__VA_ARGS__);                  \
      case ::fastgan::cpu::Isa::avx512_bf16: return avx512_bf16::name(__VA_ARGS__);  \
      case ::fastgan::cpu::Isa::avx512: return avx512::name(__VA_ARGS__);            \
      case ::fastgan::cpu::Isa::avx2: return avx2::name(__VA_ARGS__);                \
      default: return baseline::name(__VA_ARGS__);                                   \
    }                                                                                \
  }()
#else
#define FASTGAN_PER_ISA(ret, name, args) \
  namespace baseline { ret name args; }
#define FASTGAN_PER_ISA_BF16 FASTGAN_PER_ISA
#define FASTGAN_ISA_CALL(name, ...) baseline::name(__VA_ARGS__)
#endif
