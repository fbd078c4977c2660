// Bodies of cuda/ptx90.h on the CPU.
#pragma once
#include "cuda/tensor_map.h"
#include "wgmma_emulated.h"

namespace ptx {

// ---- mbarrier ------------------------------------------------------------------------------------------------------
namespace detail {

struct Mbarrier {  // its state lies in the kernel's shared memory; fresh memory is filled with 0xff
  int32_t bytes;
  uint16_t pending;
  uint16_t expected_and_phase;  // expected << 1 | phase
};
static_assert(sizeof(Mbarrier) == 8);

EMU_UNWATCHED inline Mbarrier* mbarrier(emu::Block& b, uint32_t m) {
  auto* state = reinterpret_cast<Mbarrier*>(emu::shared_bytes(b, m, 8, 8));
  if (state->expected_and_phase == 0xffff) emu::fail("mbarrier: used before its init");
  return state;
}
EMU_UNWATCHED inline Mbarrier* mbarrier(uint32_t m) { return mbarrier(emu::block_of(m), m); }

EMU_UNWATCHED inline void complete_if_done(Mbarrier* m) {
  if (m->pending || m->bytes) return;
  m->expected_and_phase ^= 1;
  m->pending = m->expected_and_phase >> 1;
  auto& waits = emu::cluster().mbarrier_waits;
  for (size_t i = 0; i < waits.size();) {
    if (waits[i].first == m) {
      emu::wake(waits[i].second);
      waits.erase(waits.begin() + static_cast<std::ptrdiff_t>(i));
    } else {
      ++i;
    }
  }
}
EMU_UNWATCHED inline void arrive(uint32_t m, uint32_t bytes) {
  emu::Unwatched quiet;
  Mbarrier* state = mbarrier(m);
  if (!state->pending) emu::fail("mbarrier: more arrivals than expected");
  state->bytes += static_cast<int32_t>(bytes);
  --state->pending;
  complete_if_done(state);
}
EMU_UNWATCHED inline void wait(uint32_t m, uint32_t parity) {
  emu::Unwatched quiet;
  while ((mbarrier(m)->expected_and_phase & 1u) == parity) {
    emu::cluster().mbarrier_waits.push_back({mbarrier(m), &emu::self()});
    emu::wait_in("mbarrier.try_wait");
  }
}
EMU_UNWATCHED inline void complete_bytes(emu::Block& b, uint32_t m, uint32_t bytes) {
  emu::Unwatched quiet;
  Mbarrier* state = mbarrier(b, m);
  state->bytes -= static_cast<int32_t>(bytes);
  complete_if_done(state);
}

}  // namespace detail

EMU_UNWATCHED inline void mbar_init(uint32_t m, uint32_t n) {
  emu::Unwatched quiet;
  auto* state = reinterpret_cast<detail::Mbarrier*>(emu::shared_bytes(m, 8, 8));
  *state = {0, static_cast<uint16_t>(n), static_cast<uint16_t>(n << 1)};
  emu::mark_unfenced(m, 8);
}
inline void mbar_arrive(uint32_t m) {
  emu::release(emu::shared_bytes(m, 8, 8));
  detail::arrive(m, 0);
}
inline void mbar_arrive_cluster(uint32_t m) { mbar_arrive(m); }
inline void mbar_expect_tx(uint32_t m, uint32_t bytes) {
  emu::release(emu::shared_bytes(m, 8, 8));
  detail::arrive(m, bytes);
}
inline void mbar_wait(uint32_t m, uint32_t parity) {
  detail::wait(m, parity);
  emu::acquire(emu::shared_bytes(m, 8, 8));
}
inline void fence_init() { emu::fence_async_proxy(); }
inline void fence_async() { emu::fence_async_proxy(); }

// ---- TMA -----------------------------------------------------------------------------------------------------------
namespace detail {

using resnet_fused::cuda::element_size;
using resnet_fused::cuda::TensorMapGeometry;

inline const TensorMapGeometry& geometry(const CUtensorMap* map) {
  if (reinterpret_cast<uintptr_t>(map) % 64) emu::fail("TMA: the tensor map is not aligned to 64 bytes");
  return resnet_fused::cuda::decode(*map);
}

// Calls f(element of the box in shared memory's order, pointer or null outside the tensor).
template <class F>
void for_each_element(const TensorMapGeometry& g, const int* at, const int* tap, F f) {
  const int bytes = element_size(g.dtype);
  auto* base = static_cast<char*>(const_cast<void*>(g.pointer));
  auto visit = [&](uint32_t index, const int64_t* x) {
    char* p = base;
    bool inside = true;
    for (int i = 0; i < g.rank; ++i) {
      inside &= x[i] >= 0 && x[i] < static_cast<int64_t>(g.size[i]);
      p += x[i] * (i ? static_cast<int64_t>(g.stride[i]) : bytes);
    }
    f(index, inside ? p : nullptr);
  };
  int64_t x[5] = {};
  if (g.im2col) {
    int64_t w = at[1], h = at[2], n = at[3];
    const int step_w = g.step[1] ? static_cast<int>(g.step[1]) : 1,
              step_h = g.step[2] ? static_cast<int>(g.step[2]) : 1;
    const int64_t last_w = static_cast<int64_t>(g.size[1]) - 1 + g.upper[0];
    const int64_t last_h = static_cast<int64_t>(g.size[2]) - 1 + g.upper[1];
    for (uint32_t pixel = 0; pixel < g.pixels; ++pixel) {
      for (uint32_t c = 0; c < g.channels; ++c) {
        x[0] = at[0] + c;
        x[1] = w + tap[0];
        x[2] = h + tap[1];
        x[3] = n;
        visit(pixel * g.channels + c, x);
      }
      if ((w += step_w) > last_w) {
        w = g.lower[0];
        if ((h += step_h) > last_h) {
          h = g.lower[1];
          ++n;
        }
      }
    }
    return;
  }
  uint32_t count = 1;
  for (int i = 0; i < g.rank; ++i) count *= g.box[i];
  for (uint32_t e = 0; e < count; ++e) {
    uint32_t rest = e;
    for (int i = 0; i < g.rank; ++i) {
      x[i] = at[i] + static_cast<int64_t>(rest % g.box[i]) * (g.step[i] ? g.step[i] : 1);
      rest /= g.box[i];
    }
    visit(e, x);
  }
}

inline uint32_t box_elements(const TensorMapGeometry& g) {
  if (g.im2col) return g.pixels * g.channels;
  uint32_t count = 1;
  for (int i = 0; i < g.rank; ++i) count *= g.box[i];
  return count;
}

// What the asynchronous proxy does, into one block of the cluster.
inline void land_load(emu::Block& b, uint32_t dst, const TensorMapGeometry& g, uint32_t m, const int* at,
                      const int* tap) {
  const uint32_t bytes = element_size(g.dtype);
  for_each_element(g, at, tap, [&](uint32_t index, const char* source) {
    char* to = reinterpret_cast<char*>(b.shared) + layouts::swizzled(dst + index * bytes, g.swizzle);
    if (source)
      std::memcpy(to, source, bytes);
    else
      std::memset(to, 0, bytes);
  });
  emu::release(emu::shared_bytes(b, m, 8, 8));
  complete_bytes(b, m, box_elements(g) * bytes);
}

// Global memory of a programmatic launch is its own only after griddepcontrol.wait.
inline void check_grid_waited() {
  if (!emu::self().grid_waited) emu::fail("TMA before griddepcontrol.wait in a programmatic launch");
}

EMU_UNWATCHED inline void load(uint32_t dst, const CUtensorMap* map, uint32_t m, uint32_t ranks, bool im2col,
                               std::vector<int> at, std::vector<int> tap = {}) {
  emu::Unwatched quiet;
  check_grid_waited();
  const TensorMapGeometry& g = geometry(map);
  const uint32_t bytes = box_elements(g) * static_cast<uint32_t>(element_size(g.dtype));
  if (static_cast<int>(at.size()) != g.rank || im2col != g.im2col) emu::fail("TMA: the map has another rank or mode");
  emu::shared_bytes(dst, bytes, g.swizzle == 128 ? 1024 : 128);
  emu::check_fenced(emu::block(), m, 8, "TMA");
  auto issued = std::make_shared<char>();
  emu::release(issued.get());  // the issuer's past comes before the copy
  for (emu::Block& b : emu::cluster().blocks) {
    if (!(ranks >> b.rank & 1)) continue;
    mbarrier(b, m);
    auto land = [&b, dst, &g, m, at, tap, issued] {
      emu::acquire(issued.get());
      land_load(b, dst, g, m, at.data(), tap.data());
    };
    if (emu::lands_at_once())
      land();
    else
      emu::cluster().in_flight.push_back(land);
  }
}
inline uint32_t own_rank() { return 1u << emu::block().rank; }

inline void store(const CUtensorMap* map, uint32_t src, std::vector<int> at) {
  check_grid_waited();
  const TensorMapGeometry& g = geometry(map);
  const uint32_t bytes = element_size(g.dtype), all = box_elements(g) * bytes;
  if (static_cast<int>(at.size()) != g.rank || g.im2col) emu::fail("TMA: the map has another rank or mode");
  emu::shared_bytes(src, all, g.swizzle == 128 ? 1024 : 128);
  emu::Block& b = emu::block();
  emu::check_fenced(b, src, all, "TMA store");
  auto land = [&b, src, &g, at, bytes] {
    for_each_element(g, at.data(), nullptr, [&](uint32_t index, char* destination) {
      if (destination) std::memcpy(destination, b.shared + layouts::swizzled(src + index * bytes, g.swizzle), bytes);
    });
  };
  if (emu::lands_at_once()) return land();
  emu::Unwatched quiet;
  emu::self().stores.add(land);
}

}  // namespace detail

inline void tma_load_2d(uint32_t dst, const CUtensorMap* map, uint32_t m, int c0, int c1) {
  detail::load(dst, map, m, detail::own_rank(), false, {c0, c1});
}
inline void tma_load_3d(uint32_t dst, const CUtensorMap* map, uint32_t m, int c0, int c1, int c2) {
  detail::load(dst, map, m, detail::own_rank(), false, {c0, c1, c2});
}
inline void tma_load_4d(uint32_t dst, const CUtensorMap* map, uint32_t m, int c0, int c1, int c2, int c3) {
  detail::load(dst, map, m, detail::own_rank(), false, {c0, c1, c2, c3});
}
inline void tma_load_5d(uint32_t dst, const CUtensorMap* map, uint32_t m, int c0, int c1, int c2, int c3, int c4) {
  detail::load(dst, map, m, detail::own_rank(), false, {c0, c1, c2, c3, c4});
}
inline void tma_load_multicast_2d(uint32_t dst, const CUtensorMap* map, uint32_t m, uint16_t mask, int c0, int c1) {
  detail::load(dst, map, m, mask, false, {c0, c1});
}
inline void tma_load_multicast_4d(uint32_t dst, const CUtensorMap* map, uint32_t m, uint16_t mask, int c0, int c1,
                                  int c2, int c3) {
  detail::load(dst, map, m, mask, false, {c0, c1, c2, c3});
}
inline void tma_load_im2col(uint32_t dst, const CUtensorMap* map, uint32_t m, int c, int w, int h, int n, int s,
                            int r) {
  detail::load(dst, map, m, detail::own_rank(), true, {c, w, h, n}, {s, r});
}
inline void tma_store_2d(const CUtensorMap* map, uint32_t src, int c0, int c1) { detail::store(map, src, {c0, c1}); }
inline void tma_store_3d(const CUtensorMap* map, uint32_t src, int c0, int c1, int c2) {
  detail::store(map, src, {c0, c1, c2});
}
inline void tma_store_4d(const CUtensorMap* map, uint32_t src, int c0, int c1, int c2, int c3) {
  detail::store(map, src, {c0, c1, c2, c3});
}
inline void tma_store_5d(const CUtensorMap* map, uint32_t src, int c0, int c1, int c2, int c3, int c4) {
  detail::store(map, src, {c0, c1, c2, c3, c4});
}
inline void tma_store_commit() {
  emu::Unwatched quiet;
  emu::self().stores.commit();
}
template <int N>
void tma_store_wait() {
  std::vector<emu::Operation> group;
  while (emu::self().stores.pop(N, group))
    for (const emu::Operation& op : group) op();
}
inline void tma_prefetch(const CUtensorMap* map) { detail::geometry(map); }

EMU_UNWATCHED inline void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t m) {
  emu::Unwatched quiet;
  detail::check_grid_waited();
  if (reinterpret_cast<uintptr_t>(src) % 16 || bytes % 16) emu::fail("cp.async.bulk: misaligned source or size");
  emu::Block& b = emu::block();
  unsigned char* to = emu::shared_bytes(dst, bytes, 16);
  emu::check_fenced(b, m, 8, "cp.async.bulk");
  detail::mbarrier(m);
  auto issued = std::make_shared<char>();
  emu::release(issued.get());
  auto land = [&b, to, src, bytes, m, issued] {
    emu::acquire(issued.get());
    std::memcpy(to, src, bytes);
    emu::release(emu::shared_bytes(b, m, 8, 8));
    detail::complete_bytes(b, m, bytes);
  };
  if (emu::lands_at_once())
    land();
  else
    emu::cluster().in_flight.push_back(land);
}

// ---- matrices ------------------------------------------------------------------------------------------------------
namespace detail {

struct StoredRow {
  uint32_t fragment[4];
  uint16_t row[8];
};
inline void store_matrices(uint32_t addr, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3, bool transposed,
                           const char* name) {
  StoredRow lane{{r0, r1, r2, r3}, {}};
  emu::collective(emu::kAllLanes, name, &lane, [transposed](void** lanes) {
    for (int l = 0; l < 32; ++l)
      for (int column = 0; column < 8; ++column) {
        const int i = l / 8, row = transposed ? column : l % 8, of = transposed ? l % 8 : column;
        static_cast<StoredRow*>(lanes[l])->row[column] =
            static_cast<uint16_t>(static_cast<StoredRow*>(lanes[row * 4 + of / 2])->fragment[i] >> of % 2 * 16);
      }
  });
  std::memcpy(emu::shared_bytes(addr, 16, 16), lane.row, 16);
  emu::mark_unfenced(addr, 16);
}

}  // namespace detail

inline void stmatrix_x4(uint32_t addr, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  detail::store_matrices(addr, r0, r1, r2, r3, false, "stmatrix.x4");
}
inline void stmatrix_x4_t(uint32_t addr, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  detail::store_matrices(addr, r0, r1, r2, r3, true, "stmatrix.x4.trans");
}
template <int R>
void reg_inc() {
  static_assert(R >= 24 && R <= 256 && R % 8 == 0);
}
template <int R>
void reg_dec() {
  static_assert(R >= 24 && R <= 256 && R % 8 == 0);
}

// ---- clusters and grids --------------------------------------------------------------------------------------------
inline uint32_t cluster_rank() { return static_cast<uint32_t>(emu::block().rank); }
inline uint32_t mapa(uint32_t addr, uint32_t rank) { return addr | (rank + 1) << emu::kRankShift; }
inline void cluster_arrive() {
  emu::Cluster& c = emu::cluster();
  emu::release(&c.barrier.token);
  emu::Unwatched quiet;
  emu::self().cluster_phase = c.barrier_phase;
  if (emu::arrive(c.barrier, static_cast<int>(c.blocks.size()) * c.block_threads, false, "barrier.cluster.arrive"))
    ++c.barrier_phase;
}
inline void cluster_wait() {
  emu::Cluster& c = emu::cluster();
  if (c.barrier_phase == emu::self().cluster_phase) {
    {
      emu::Unwatched quiet;
      c.barrier.waiting.push_back(&emu::self());
    }
    emu::wait_in("barrier.cluster.wait");
  }
  emu::acquire(&c.barrier.token);
}
inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
inline void grid_wait() { emu::self().grid_waited = true; }
inline void grid_launch_dependents() {}

}  // namespace ptx
