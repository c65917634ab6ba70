// Groups of weights to grids and codes, and codes to bit strings. The slow twins are quantizers/grid.py and qtensor.py.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "kernels.hpp"
#include "mopeq_cpu.h"
#include "product.hpp"
#include "threads.hpp"

namespace mopeq {
namespace {

constexpr int64_t TALL = 16;  // rows at a time

struct Rounding {
  const mopeq_grids_job &job;
  const Kernels &kernels;
  int64_t blocks;  // of an expert
  std::atomic<int> fault{MOPEQ_OK};
};

// Some blocks of rows, with `room` for what a search needs and for rows as float32.
void blocks(Rounding &r, int64_t begin, int64_t end, float *room) {
  const mopeq_grids_job &job = r.job;
  const int64_t size = job.inputs / job.groups;
  const int levels = 1 << job.bits;
  float *const wide = room + TALL * size;
  for (int64_t block = begin; block < end; block++) {
    const int64_t expert = block / r.blocks, first = block % r.blocks * TALL, rows = std::min(TALL, job.rows - first);
    const int64_t row = expert * job.rows + first;
    const char *const from = static_cast<const char *>(job.weight) + row * job.inputs * size_of(job.type);
    const float *w = reinterpret_cast<const float *>(from);
    if (job.type != MOPEQ_F32) r.kernels.loops.widen(from, job.type, rows * job.inputs, wide), w = wide;
    float *const scale = job.scale + row * job.groups, *const zero = job.zero + row * job.groups;
    const auto each = [&](auto work) {
      for (int64_t n = 0; n < rows; n++)
        for (int64_t g = 0; g < job.groups; g++) work(w + n * job.inputs + g * size, n * job.groups + g);
    };
    if (!job.given) {
      bool fine = true;
      each([&](const float *group, int64_t at) {
        fine &= r.kernels.grids.minmax(group, size, levels, job.symmetric != 0, scale + at, zero + at);
      });
      if (!fine) return r.fault.store(MOPEQ_VALUE);
    }
    if (job.factor_count + job.refits > 0)
      for (int64_t g = 0; g < job.groups; g++)
        r.kernels.grids.search({w + g * size, rows, job.inputs, size,
                                job.importance ? job.importance + expert * job.inputs + g * size : nullptr, job.factors,
                                job.factor_count, job.refits, levels, job.symmetric != 0, scale + g, zero + g,
                                job.groups, room});
    if (job.codes)
      each([&](const float *group, int64_t at) {
        r.kernels.grids.nearest(group, size, scale[at], zero[at], levels, job.codes + row * job.inputs + at * size);
      });
  }
}

void some_blocks(int64_t begin, int64_t end, void *context) {
  Rounding &r = *static_cast<Rounding *>(context);
  const int64_t size = r.job.inputs / r.job.groups;
  const size_t bytes = size_t(TALL * (size + (r.job.type == MOPEQ_F32 ? 0 : r.job.inputs))) * 4;
  const std::unique_ptr<void, decltype(&std::free)> room{std::aligned_alloc(64, bytes), &std::free};
  if (room)
    blocks(r, begin, end, static_cast<float *>(room.get()));
  else
    r.fault.store(MOPEQ_MEMORY);
}

int grids(const mopeq_grids_job &job) {
  if (!job.weight || !job.scale || !job.zero || (job.factor_count && !job.factors)) return MOPEQ_NULL;
  if (job.type < MOPEQ_F32 || job.type > MOPEQ_F16) return MOPEQ_TYPE;
  if (job.bits < 2 || job.bits > 8) return MOPEQ_BITS;
  for (const int64_t n : {job.experts, job.rows, job.inputs, job.groups})
    if (n < 1 || n >= LIMIT) return MOPEQ_SHAPE;
  if (job.factor_count < 0 || job.refits < 0) return MOPEQ_SHAPE;
  if (job.inputs % job.groups) return MOPEQ_GROUP;
  for (const void *p : {static_cast<const void *>(job.importance), static_cast<const void *>(job.factors),
                        static_cast<const void *>(job.scale), static_cast<const void *>(job.zero)})
    if (misaligned(p, 4)) return MOPEQ_ALIGN;
  if (misaligned(job.weight, uintptr_t(size_of(job.type)))) return MOPEQ_ALIGN;
  Rounding r{job, *table_of(isa()), (job.rows + TALL - 1) / TALL};
  run(job.experts * r.blocks, job.threads, some_blocks, &r);
  return r.fault.load();
}

struct Packing {
  const uint8_t *codes;
  uint8_t *to;
};

// `width` bits at every multiple of 2 * `room`, and those `room` above them moved down to their end.
inline uint64_t joined(uint64_t v, int room, int width, uint64_t places) {
  const uint64_t low = ((uint64_t(1) << width) - 1) * places;
  return (v & low) | (v >> (room - width) & low << width);
}

// 8 codes in a word: neighbours are joined, then pairs, then fours.
template <int B>
void packed(int64_t begin, int64_t end, void *context) {
  const Packing &p = *static_cast<Packing *>(context);
  for (int64_t i = begin; i < end; i++) {
    uint64_t v;
    std::memcpy(&v, p.codes + 8 * i, 8);
    v = joined(v, 8, B, 0x0001000100010001u);
    v = joined(v, 16, 2 * B, 0x0000000100000001u);
    v = joined(v, 32, 4 * B, 1);
    std::memcpy(p.to + B * i, &v, B);
  }
}

}  // namespace
}  // namespace mopeq

extern "C" {

int mopeq_grids(const mopeq_grids_job *job) { return job ? mopeq::grids(*job) : MOPEQ_NULL; }

int mopeq_pack_bits(const uint8_t *codes, uint8_t *to, int64_t count, int64_t bits, int64_t threads) {
  if (!codes || !to) return MOPEQ_NULL;
  if (count < 0 || count % 8 || count >> 40) return MOPEQ_SHAPE;
  constexpr mopeq::Work works[] = {mopeq::packed<2>, mopeq::packed<3>, mopeq::packed<4>,
                                   mopeq::packed<5>, mopeq::packed<6>, mopeq::packed<7>};
  if (bits < 2 || bits > 7) return MOPEQ_BITS;
  mopeq::Packing packing{codes, to};
  mopeq::run(count / 8, threads, works[bits - 2], &packing);
  return MOPEQ_OK;
}

}  // extern "C"
