// The C interface, and the call for rows through linears.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "attention.hpp"
#include "experts.hpp"
#include "product.hpp"
#include "routing.hpp"
#include "threads.hpp"

namespace mopeq {
namespace {

constexpr int64_t FEW = 1 << 14;  // numbers that are not worth waking threads

struct Typed {
  const char *x;
  int64_t type, width;
};

void widen_row(int64_t row, float *to, const void *context) {
  const Typed &from = *static_cast<const Typed *>(context);
  loops().widen(from.x + row * from.width * size_of(from.type), from.type, from.width, to);
}

int check_x(const void *x, int64_t rows, int64_t type, Digits digits) {
  if (type < MOPEQ_F32 || type > MOPEQ_F16 || !digits.exist()) return MOPEQ_TYPE;
  if (rows < 0 || rows >= LIMIT) return MOPEQ_SHAPE;
  return misaligned(x, uintptr_t(size_of(type))) ? MOPEQ_ALIGN : MOPEQ_OK;
}

struct Narrowing {
  const float *from;
  char *to;
  int64_t type, width;
};

void narrowing(int64_t begin, int64_t end, void *context) {
  const Narrowing &n = *static_cast<Narrowing *>(context);
  loops().narrow(n.from + begin * n.width, n.type, (end - begin) * n.width, n.to + begin * n.width * size_of(n.type));
}

int linear(const mopeq_job &job) {
  if (!job.x || !job.out) return MOPEQ_NULL;
  if (const int wrong = check_x(job.x, job.rows, job.x_type, {job.digits, job.coarse})) return wrong;
  if (const int wrong = check(job.group, job.inputs)) return wrong;
  if (job.out_features < 1 || job.out_features >= LIMIT) return MOPEQ_SHAPE;
  if (misaligned(job.out, uintptr_t(size_of(job.x_type))) || misaligned(job.offsets, 8)) return MOPEQ_ALIGN;
  const int64_t whole[2] = {0, job.rows}, *given = job.offsets ? job.offsets : whole;
  if (!job.offsets && job.group.experts != 1) return MOPEQ_NULL;
  int64_t last = 0;
  for (int64_t e = 0; e <= job.group.experts; e++) {
    if (given[e] < last || given[e] > job.rows) return MOPEQ_OFFSETS;
    last = given[e];
  }
  const int64_t begin = given[0], rows = last - begin, n = job.out_features, size = size_of(job.x_type);
  std::vector<int64_t> offsets(given, given + job.group.experts + 1), order(size_t(rows), 0);
  for (int64_t &offset : offsets) offset -= begin;
  Product product(job.group);
  if (const int wrong = product.plan(offsets.data(), job.inputs, n)) return wrong;
  char *const out = static_cast<char *>(job.out);
  std::memset(out, 0, size_t(begin * n * size));
  std::memset(out + last * n * size, 0, size_t((job.rows - last) * n * size));
  if (rows == 0) return MOPEQ_OK;
  std::iota(order.begin(), order.end(), 0);

  const Typed from{static_cast<const char *>(job.x) + begin * job.inputs * size, job.x_type, job.inputs};
  const Filled x(product, rows, job.inputs, {job.digits, job.coarse}, job.threads, widen_row, &from);
  const bool wide = job.x_type == MOPEQ_F32;
  const Memory sums(wide ? 0 : rows * n, 4);
  product.rows = order.data();
  product.out = wide ? static_cast<float *>(job.out) + begin * n : sums.floats();
  run(&product, 1, job.threads);
  if (!wide) {
    Narrowing rest{sums.floats(), out + begin * n * size, job.x_type, n};
    run(rows, rows * n < FEW ? 1 : job.threads, narrowing, &rest);
  }
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

template <class Job>
int guarded(const Job *job, int (*call)(const Job &)) {
  if (!job) return MOPEQ_NULL;
  try {
    return call(*job);
  } catch (const std::bad_alloc &) {
    return MOPEQ_MEMORY;
  } catch (const std::length_error &) {  // more than a vector can ever hold
    return MOPEQ_MEMORY;
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
  mopeq::use_isa(isa);
  return MOPEQ_OK;
}

void mopeq_set_parallel_for(void *function) { mopeq::set_parallel_for(function); }

int mopeq_grouped_linear(const mopeq_job *job) { return mopeq::guarded(job, mopeq::linear); }
int mopeq_experts(const mopeq_experts_job *job) { return mopeq::guarded(job, mopeq::experts); }
int mopeq_moe(const mopeq_moe_job *job) { return mopeq::guarded(job, mopeq::moe); }
int mopeq_attention(const mopeq_attention_job *job) { return mopeq::guarded(job, mopeq::attention); }

uint64_t mopeq_read(const void *data, int64_t bytes, int64_t threads) {
  if (!data || bytes < 0) return 0;
  mopeq::Reading reading{static_cast<const char *>(data), bytes, std::max<int64_t>(threads, 1),
                         mopeq::table_of(mopeq::isa())};
  mopeq::run(reading.parts, threads, mopeq::reading, &reading);
  return reading.sum.load();
}

}  // extern "C"
