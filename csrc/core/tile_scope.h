// The thread state that a level's tiles need (MatmulKernels, ScreenKernels): set for one task, released with it.
#pragma once

namespace refine_fast {

// No other library may run on the thread meanwhile: it might configure the tiles for itself (oneDNN does).
template <class Kernels>
class TileScope {
 public:
  explicit TileScope(const Kernels& kernels) : kernels_(kernels) {
    if (kernels_.begin_tiles != nullptr) kernels_.begin_tiles();
  }
  ~TileScope() {
    if (kernels_.end_tiles != nullptr) kernels_.end_tiles();
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  const Kernels& kernels_;
};

}  // namespace refine_fast
