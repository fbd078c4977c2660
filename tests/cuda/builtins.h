// CUDA's built-in functions on the CPU: barriers, shuffles.
#pragma once
#include "emulator.h"

namespace emu {

template <class T>
T shuffle(unsigned mask, T value, int source, const char* name) {
  struct Lane {
    T value, result;
    int source;
  } lane{value, value, source};
  collective(mask, name, &lane, [mask](void** lanes) {
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      Lane* to = static_cast<Lane*>(lanes[l]);
      if (!(mask >> to->source & 1)) fail("shuffle from a lane outside the mask");
      to->result = static_cast<Lane*>(lanes[to->source])->value;
    }
  });
  return lane.result;
}
inline int lane_id() { return self().id & 31; }

}  // namespace emu

inline void __syncthreads() {
  emu::synchronize(emu::block().barriers[0], emu::cluster().block_threads, "__syncthreads");
}

inline void __syncwarp(unsigned mask = emu::kAllLanes) {
  char* token = &emu::block().warps[emu::self().id >> 5].token;
  emu::release(token);
  emu::collective(mask, "__syncwarp", nullptr, [](void**) {});
  emu::acquire(token);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = emu::lane_id();
  return emu::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), "__shfl_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = emu::lane_id(), source = lane ^ bits;
  return emu::shuffle(mask, value, (source & ~(width - 1)) > (lane & ~(width - 1)) ? lane : source, "__shfl_xor_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emu::lane_id(), distance = static_cast<int>(delta);
  return emu::shuffle(mask, value, (lane & (width - 1)) + distance < width ? lane + distance : lane,
                      "__shfl_down_sync");
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
