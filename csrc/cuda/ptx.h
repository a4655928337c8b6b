// The PTX instructions of the kernels, one function each, and the block's dynamic shared memory.
// tests/cuda_emulation/cuda/ptx.h defines the same functions in plain C++, for tests without a GPU. sm_80 and newer:
// older devices trap, and the host launches nothing there.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace refine_fast {

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define REFINE_FAST_SM_80(instruction) __trap()
#else
#define REFINE_FAST_SM_80(instruction) instruction
#endif

// clang-format off: it breaks the operands of asm

// Copies 16 bytes from global to shared memory asynchronously, until copy_async_wait waits for its group.
__device__ inline void copy_async(void* shared, const void* global) {
  REFINE_FAST_SM_80(asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                                 ::"r"(shared_address(shared)), "l"(global) : "memory"));
}
__device__ inline void copy_async_commit() { REFINE_FAST_SM_80(asm volatile("cp.async.commit_group;" ::: "memory")); }
// Waits until at most kPending of this thread's groups are in flight.
template <int kPending>
__device__ inline void copy_async_wait() {
  REFINE_FAST_SM_80(asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory"));
}

// Four 8 x 8 matrices of 16-bit elements: lane 8 m + r gives the address of row r of matrix m, and gets elements 2
// (lane % 4), + 1 of row lane / 4 of matrix m in out[m].
__device__ inline void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row)));
}

// c += a b for a 16 x 16 matrix a of halves, 16 x 8 b of halves and 16 x 8 c of floats, fragments as PTX lays them out.
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  REFINE_FAST_SM_80(asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)));
}

// clang-format on

#undef REFINE_FAST_SM_80

}  // namespace refine_fast
