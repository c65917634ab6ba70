// The call: checks, activations to digits, panels handed out to threads.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "activations.hpp"
#include "kernels.hpp"
#include "mopeq_cpu.h"
#include "threads.hpp"

namespace mopeq {
namespace {

constexpr int64_t LIMIT = int64_t(1) << 31;  // of rows, inputs, experts: products stay in int64
constexpr int64_t PIECE = 64 << 10;          // bytes of codes that a thread takes at a time
constexpr int64_t ALONE = 96 << 10;          // less work, in bytes of codes, is not worth waking threads
constexpr int TILES[] = {1, 2, 4};

int width_index(int64_t bits) {
  switch (bits) {
    case 2: case 3: case 4: case 5: case 6: return int(bits) - 2;
    case 8: return 5;
    default: return -1;
  }
}

const Kernels *table_of(int isa) {
#if defined(MOPEQ_X86)
  __builtin_cpu_init();
  if (isa == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return &avx512_kernels();
  if (isa == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return &avx2_kernels();
#endif
  return isa == 0 ? &portable_kernels() : nullptr;
}

int best_isa() {
  for (int isa = 2; isa > 0; isa--)
    if (table_of(isa)) return isa;
  return 0;
}

std::atomic<int> chosen{-1};

int isa() {
  int found = chosen.load(std::memory_order_relaxed);
  if (found < 0) chosen.store(found = best_isa());
  return found;
}

bool misaligned(const void *p, uintptr_t to) { return reinterpret_cast<uintptr_t>(p) % to != 0; }

int check(const mopeq_matrix &m, const mopeq_job &job) {
  if (m.rows < 8 || m.rows % 8 || m.rows >= LIMIT || m.inputs != job.inputs) return MOPEQ_SHAPE;
  const auto inside = [](int64_t begin, int64_t count, int64_t size) {
    return begin >= 0 && count >= 0 && begin <= size && count <= size - begin;
  };
  if (m.bits == 16) return inside(m.codes, 2 * m.rows * m.inputs, job.codes_size) && m.codes % 2 == 0 ? MOPEQ_OK
                                                                                                     : MOPEQ_RANGE;
  if (width_index(m.bits) < 0) return MOPEQ_BITS;
  if (m.group < BLOCK || m.group % BLOCK || m.inputs % m.group) return MOPEQ_GROUP;
  const int64_t groups = m.inputs / m.group;
  if (!inside(m.codes, m.rows * (m.inputs * m.bits / 8), job.codes_size)) return MOPEQ_RANGE;
  if (!job.scales || !inside(m.scales, m.rows * groups, job.scales_size)) return MOPEQ_RANGE;
  if (!m.symmetric && (!job.zeros || !inside(m.zeros, groups * (m.rows * m.bits / 8), job.zeros_size)))
    return MOPEQ_RANGE;
  return MOPEQ_OK;
}

int check(const mopeq_job &job) {
  if (!job.x || !job.out || !job.codes || !job.matrices) return MOPEQ_NULL;
  if (job.x_type < MOPEQ_F32 || job.x_type > MOPEQ_F16 || job.digits < 1 || job.digits > MAX_DIGITS) return MOPEQ_TYPE;
  if (job.rows < 0 || job.rows >= LIMIT || job.inputs < BLOCK || job.inputs % BLOCK || job.inputs >= LIMIT ||
      job.experts < 1 || job.experts >= LIMIT || job.per_expert < 1 || job.per_expert > 16 || job.out_features < 1 ||
      job.out_features >= LIMIT || job.codes_size < 0 || job.scales_size < 0 || job.zeros_size < 0)
    return MOPEQ_SHAPE;
  if (misaligned(job.x, job.x_type == MOPEQ_F32 ? 4 : 2) || misaligned(job.out, 4) || misaligned(job.scales, 2) ||
      misaligned(job.matrices, 8) || misaligned(job.offsets, 8))
    return MOPEQ_ALIGN;
  if (!job.offsets) return job.experts == 1 ? MOPEQ_OK : MOPEQ_NULL;
  int64_t last = 0;
  for (int64_t e = 0; e <= job.experts; e++) {
    if (job.offsets[e] < last || job.offsets[e] > job.rows) return MOPEQ_OFFSETS;
    last = job.offsets[e];
  }
  return MOPEQ_OK;
}

// A matrix that has rows of x, and the pieces it is handed out in.
struct Part {
  const mopeq_matrix *matrix;
  int64_t begin, end;     // rows of x
  int64_t column;         // of out
  int64_t first, panels;  // number of its first piece; panels a piece
};

struct Call {
  const mopeq_job *job;
  const Kernels *kernels;
  std::vector<Part> parts;
  int64_t pieces = 0, bytes = 0, begin = 0, end = 0;  // begin, end: rows of x that belong to experts
  Activations x{};
  const float *wide = nullptr;  // (rows, inputs) from `begin` on
  std::atomic<int64_t> next{0};
};

int64_t panels_of(const mopeq_matrix &m) { return (m.rows + PANEL - 1) / PANEL; }

void piece(const Call &call, const Part &part, int64_t number) {
  const mopeq_job &job = *call.job;
  const mopeq_matrix &m = *part.matrix;
  const int64_t first = (number - part.first) * part.panels, last = std::min(first + part.panels, panels_of(m));
  for (int64_t p = first; p < last; p++) {
    const int64_t row = p * PANEL, height = std::min<int64_t>(PANEL, m.rows - row);
    const int tall = height == PANEL;
    Panel panel{};
    const uint16_t *dense = nullptr;
    if (m.bits == 16) {
      dense = reinterpret_cast<const uint16_t *>(job.codes + m.codes) + row * m.inputs;
    } else {
      const int64_t groups = m.inputs / m.group;
      panel.codes = job.codes + m.codes + row * (m.inputs * m.bits / 8);
      panel.scales = job.scales + m.scales + row * groups;
      panel.zeros = m.symmetric ? nullptr : job.zeros + m.zeros + row / 8 * m.bits * groups;
      panel.groups = groups, panel.blocks = m.group / BLOCK;
    }
    for (int64_t t = part.begin; t < part.end;) {
      int tile = 2;
      while (TILES[tile] > part.end - t) tile--;
      float *out = job.out + t * job.out_features + part.column + row;
      if (dense)
        call.kernels->dense[tile](dense, height, m.inputs, call.wide + (t - call.begin) * m.inputs, out,
                                  job.out_features);
      else
        call.kernels->panel[width_index(m.bits)][job.digits - 1][tile][tall](panel, call.x, t - call.begin, out,
                                                                              job.out_features);
      t += TILES[tile];
    }
  }
}

void pieces(int64_t, int64_t, void *context) {
  Call &call = *static_cast<Call *>(context);
  for (int64_t n; (n = call.next.fetch_add(1, std::memory_order_relaxed)) < call.pieces;) {
    const auto after = std::upper_bound(call.parts.begin(), call.parts.end(), n,
                                        [](int64_t value, const Part &part) { return value < part.first; });
    piece(call, *(after - 1), n);
  }
}

struct Rows {
  const Call *call;
  float *wide;
  int8_t *digits;
  float *scales;
  int32_t *minus;
  bool splits;
};

void activations(int64_t begin, int64_t end, void *context) {
  const Rows &rows = *static_cast<Rows *>(context);
  const mopeq_job &job = *rows.call->job;
  const int64_t k = job.inputs, blocks = k / BLOCK, size = job.x_type == MOPEQ_F32 ? 4 : 2, d = job.digits;
  for (int64_t r = begin; r < end; r++) {
    const void *x = static_cast<const char *>(job.x) + (rows.call->begin + r) * k * size;
    const float *wide = static_cast<const float *>(x);
    if (rows.wide) widen(x, job.x_type, k, rows.wide + r * k), wide = rows.wide + r * k;
    if (rows.splits)
      split(wide, blocks, int(d), rows.digits + r * k * d, rows.scales + r * blocks, rows.minus + r * blocks * d);
  }
}

int linear(const mopeq_job &job) {
  if (const int wrong = check(job)) return wrong;
  Call call;
  call.job = &job, call.kernels = table_of(isa());
  const int64_t whole[2] = {0, job.rows};
  const int64_t *offsets = job.offsets ? job.offsets : whole;
  call.begin = offsets[0], call.end = offsets[job.experts];
  bool packed = false, dense = false;
  for (int64_t e = 0; e < job.experts; e++) {
    int64_t column = 0;
    if (offsets[e] == offsets[e + 1]) continue;
    for (int64_t i = 0; i < job.per_expert; i++) {
      const mopeq_matrix &m = job.matrices[e * job.per_expert + i];
      if (const int wrong = check(m, job)) return wrong;
      const int64_t panel_bytes = PANEL * m.inputs * m.bits / 8, panels = std::max<int64_t>(1, PIECE / panel_bytes);
      call.parts.push_back({&m, offsets[e], offsets[e + 1], column, call.pieces, panels});
      call.pieces += (panels_of(m) + panels - 1) / panels;
      call.bytes += panels_of(m) * panel_bytes * (offsets[e + 1] - offsets[e]);
      column += m.rows;
      (m.bits == 16 ? dense : packed) = true;
    }
    if (column != job.out_features) return MOPEQ_SHAPE;
  }
  std::memset(job.out, 0, size_t(call.begin * job.out_features) * 4);
  std::memset(job.out + call.end * job.out_features, 0, size_t((job.rows - call.end) * job.out_features) * 4);
  const int64_t rows = call.end - call.begin, blocks = job.inputs / BLOCK;
  if (rows == 0) return MOPEQ_OK;

  const bool widens = job.x_type != MOPEQ_F32;
  const int64_t wide_bytes = widens ? rows * job.inputs * 4 : 0;
  const int64_t digit_bytes = packed ? rows * job.inputs * job.digits : 0;
  const int64_t scale_bytes = packed ? rows * blocks * 4 : 0, minus_bytes = scale_bytes * job.digits;
  struct Free {
    void operator()(char *p) const { std::free(p); }
  };
  const std::unique_ptr<char, Free> memory(
      static_cast<char *>(std::malloc(size_t(64 + wide_bytes + digit_bytes + scale_bytes + minus_bytes))));
  if (!memory) return MOPEQ_MEMORY;
  char *at = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
  Rows made{&call, nullptr, nullptr, nullptr, nullptr, packed};
  if (widens) made.wide = reinterpret_cast<float *>(at);
  made.digits = reinterpret_cast<int8_t *>(at += wide_bytes);
  made.scales = reinterpret_cast<float *>(at += digit_bytes);
  made.minus = reinterpret_cast<int32_t *>(at += scale_bytes);
  run(rows, rows * job.inputs < 65536 ? 1 : job.threads, activations, &made);
  call.x = {made.digits, made.scales, made.minus, blocks};
  if (dense)
    call.wide = widens ? made.wide : static_cast<const float *>(job.x) + call.begin * job.inputs;
  run(call.bytes < ALONE ? 1 : std::min(job.threads, call.pieces), job.threads, pieces, &call);
  return MOPEQ_OK;
}

struct Reading {
  const char *data;
  int64_t bytes, parts;
  const Kernels *kernels;
  std::atomic<uint64_t> sum{0};
};

void reading(int64_t begin, int64_t end, void *context) {
  Reading &r = *static_cast<Reading *>(context);
  for (int64_t i = begin; i < end; i++) {
    const int64_t from = r.bytes / 64 * i / r.parts * 64, to = r.bytes / 64 * (i + 1) / r.parts * 64;
    uint64_t sum = 0;
    r.kernels->read(r.data + from, to - from, &sum);
    r.sum.fetch_add(sum);
  }
}

}  // namespace
}  // namespace mopeq

extern "C" {

int mopeq_abi(void) { return MOPEQ_ABI; }
int mopeq_best_isa(void) { return mopeq::best_isa(); }
int mopeq_isa(void) { return mopeq::isa(); }

int mopeq_use_isa(int isa) {
  if (!mopeq::table_of(isa)) return MOPEQ_TYPE;
  mopeq::chosen.store(isa);
  return MOPEQ_OK;
}

void mopeq_set_parallel_for(void *function) { mopeq::set_parallel_for(function); }

int mopeq_grouped_linear(const mopeq_job *job) {
  if (!job) return MOPEQ_NULL;
  try {
    return mopeq::linear(*job);
  } catch (const std::bad_alloc &) {
    return MOPEQ_MEMORY;
  }
}

uint64_t mopeq_read(const void *data, int64_t bytes, int64_t threads) {
  mopeq::Reading reading{static_cast<const char *>(data), bytes, std::max<int64_t>(threads, 1),
                         mopeq::table_of(mopeq::isa())};
  mopeq::run(reading.parts, threads, mopeq::reading, &reading);
  return reading.sum.load();
}

}  // extern "C"
