#include "core/cpu.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace refine_fast {
namespace {

constexpr Isa kAll[] = {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx, Isa::neon};
constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx", "neon"};
constexpr int kCount = 6;

#if defined(__x86_64__)
struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned sub) {
  Registers r;
  __get_cpuid_count(leaf, sub, &r.a, &r.b, &r.c, &r.d);
  return r;
}

bool bit(unsigned word, int i) { return (word >> i) & 1u; }

bool is_intel() {
  const Registers r = cpuid(0, 0);  // "Genu" "ineI" "ntel"
  return r.b == 0x756e6547 && r.d == 0x49656e69 && r.c == 0x6c65746e;
}

// The registers that the system saves on a context switch. On some virtual machines CPUID alone reports levels that
// crash.
uint64_t xcr0() {
  if (!bit(cpuid(1, 0).c, 27)) return 0;  // OSXSAVE
  uint32_t lo, hi;
  __asm__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
}

// Linux grants the tile state on request, once for the process.
bool request_amx() {
  constexpr int kArchReqXcompPerm = 0x1023, kXfeatureTiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTiledata) == 0;
}
#endif

struct Levels {
  bool available[kCount] = {true, false, false, false, false, false};
  Kernels table[kCount] = {};

  Levels() {
    bool slow_bf16_pairs = false;
    const Kernels* own[kCount] = {&scalar_kernels, nullptr, nullptr, nullptr, nullptr, nullptr};
#if defined(__x86_64__)
    const Registers l1 = cpuid(1, 0), l7 = cpuid(7, 0), l71 = cpuid(7, 1);
    const uint64_t state = xcr0();
    const bool ymm = (state & 0x6) == 0x6, zmm = ymm && (state & 0xe0) == 0xe0, tiles = (state & 0x60000) == 0x60000;
    // FMA, F16C, AVX2
    available[1] = ymm && bit(l1.c, 12) && bit(l1.c, 29) && bit(l7.b, 5);
    // F, DQ, BW, VL
    available[2] = available[1] && zmm && bit(l7.b, 16) && bit(l7.b, 17) && bit(l7.b, 30) && bit(l7.b, 31);
    // VNNI, BF16
    available[3] = available[2] && bit(l7.c, 11) && bit(l71.a, 5);
#if defined(REFINE_FAST_EMULATE_AMX)
    (void)tiles, (void)request_amx;
    available[4] = available[3];
#else
    // AMX_BF16, AMX_TILE
    available[4] = available[3] && tiles && bit(l7.d, 22) && bit(l7.d, 24) && request_amx();
#endif
    // VDPBF16PS does twice the work of VFMADD per cycle on a Zen 5, and about the same on a Xeon: there, info_nce in
    // bf16 (B = 8,192, d = 384, one thread) takes 1.54 s with it and 1.00 s without.
    slow_bf16_pairs = is_intel();
    own[1] = &avx2_kernels, own[2] = &avx512_kernels, own[3] = &avx512_bf16_kernels, own[4] = &amx_kernels;
#elif defined(__aarch64__)
    available[5] = true;
    own[5] = &neon_kernels;
#endif
    const Kernels* below = &scalar_kernels;
    for (int i = 0; i < kCount; ++i) {
      if (own[i] == nullptr) continue;
      Kernels& t = table[i] = *own[i];
      if (i == 3 && slow_bf16_pairs) t.matmul_bf16 = nullptr;
      if (!t.matmul_f32) t.matmul_f32 = below->matmul_f32;
      if (!t.matmul_finite_f32) t.matmul_finite_f32 = t.matmul_f32;
      if (!t.matmul_bf16) t.matmul_bf16 = below->matmul_bf16;
      if (!t.lerp) t.lerp = below->lerp;
      if (!t.screen) t.screen = below->screen;
      if (!t.select) t.select = below->select;
      if (!t.loss) t.loss = below->loss;
      if (!t.fused_loss) t.fused_loss = below->fused_loss;
      if (!t.to_f32) t.to_f32 = below->to_f32;
      if (!t.from_f32) t.from_f32 = below->from_f32;
      below = &t;
    }
  }
};

const Levels& levels() {
  static const Levels instance;
  return instance;
}

std::atomic<int> current{-1};

Isa from_environment() {
  const char* name = std::getenv("REFINE_FAST_ISA");
  if (name == nullptr || *name == '\0') return isa_best();
  const Isa* isa = isa_from_name(name);
  if (isa != nullptr && isa_available(*isa)) return *isa;
  std::string names;
  for (Isa level : kAll)
    if (isa_available(level)) names += (names.empty() ? "" : ", ") + std::string(isa_name(level));
  throw IsaSettingError(std::string("REFINE_FAST_ISA is '") + name + "'; this machine has the levels " + names +
                        ": set one of them, or unset it");
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

const Isa* isa_from_name(const char* name) {
  for (int i = 0; i < kCount; ++i)
    if (std::strcmp(name, kNames[i]) == 0) return &kAll[i];
  return nullptr;
}

bool isa_available(Isa isa) { return levels().available[static_cast<int>(isa)]; }

Isa isa_best() {
  Isa best = Isa::scalar;
  for (Isa isa : kAll)
    if (isa_available(isa)) best = isa;
  return best;
}

Isa isa_current() {
  int value = current.load(std::memory_order_relaxed);
  if (value < 0) current.store(value = static_cast<int>(from_environment()), std::memory_order_relaxed);
  return static_cast<Isa>(value);
}

void isa_force(Isa isa) { current.store(static_cast<int>(isa), std::memory_order_relaxed); }

const Kernels& kernels() { return levels().table[static_cast<int>(isa_current())]; }

}  // namespace refine_fast
