// One token through the attention of a layer, with the norms and sums around it.
#include "attention.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "product.hpp"
#include "threads.hpp"

namespace mopeq {
namespace {

constexpr int64_t SHORT = 1 << 16;    // numbers of cache that are not worth waking threads

void rotate(float *x, const float *cos, const float *sin, int64_t count) {
  const int64_t half = count / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

struct Heads {
  const mopeq_attention_job *job;
  const float *q;  // (heads, size), scaled
  float *out;      // (heads, size)
};

// Query heads `begin` to `end`.
void heads(int64_t begin, int64_t end, void *context) {
  const Heads &h = *static_cast<Heads *>(context);
  const mopeq_attention_job &job = *h.job;
  const int64_t size = job.size, count = job.position + 1, each = job.room * size * size_of(job.type);
  std::vector<float> weights(size_t(count), 0.0f);
  for (int64_t head = begin; head < end; head++) {
    const int64_t from = head / (job.heads / job.kv_heads) * each;
    const Attending one{h.q + head * size, static_cast<const char *>(job.keys) + from,
                        static_cast<const char *>(job.values) + from, job.type, count, size};
    loops().attend(one, weights.data(), h.out + head * size);
  }
}

int check_job(const mopeq_attention_job &job) {
  if (!job.x || !job.h || !job.norm_before || !job.norm_after || !job.cos || !job.sin || !job.keys || !job.values ||
      !job.q_norm != !job.k_norm)
    return MOPEQ_NULL;
  if (job.type < MOPEQ_F32 || job.type > MOPEQ_F16 || !Digits{job.digits, job.coarse}.exist()) return MOPEQ_TYPE;
  if (job.heads < 1 || job.kv_heads < 1 || job.heads % job.kv_heads || job.heads >= LIMIT / MAX_HEAD || job.size < 2 ||
      job.size > MAX_HEAD || job.rotated < 0 || job.rotated > job.size || job.rotated % 2 || job.position < 0 ||
      job.position >= job.room || job.room >= LIMIT)
    return MOPEQ_SHAPE;
  const int64_t widths[] = {job.hidden, job.hidden, job.hidden, job.heads * job.size};
  const mopeq_group *groups[] = {&job.q, &job.k, &job.v, &job.o};
  for (int i = 0; i < 4; i++) {
    if (const int wrong = check(*groups[i], widths[i])) return wrong;
    if (groups[i]->experts != 1) return MOPEQ_SHAPE;
  }
  const auto size = uintptr_t(size_of(job.type));
  for (const void *p : {static_cast<const void *>(job.h), job.add, static_cast<const void *>(job.keys),
                        static_cast<const void *>(job.values)})
    if (misaligned(p, size)) return MOPEQ_ALIGN;
  for (const float *p : {static_cast<const float *>(job.x), job.norm_before, job.norm_after, job.q_bias, job.k_bias,
                         job.v_bias, job.o_bias, job.q_norm, job.k_norm, job.cos, job.sin})
    if (misaligned(p, 4)) return MOPEQ_ALIGN;
  return MOPEQ_OK;
}

void copy_row(int64_t, float *to, const void *context) {
  const auto &from = *static_cast<const std::vector<float> *>(context);
  std::copy(from.begin(), from.end(), to);
}

void add(const float *from, int64_t count, float *to) {
  if (from)
    for (int64_t i = 0; i < count; i++) to[i] += from[i];
}

// Norms of a head, or of all heads together.
void norms(float *x, const float *weight, int64_t heads, const mopeq_attention_job &job) {
  if (!weight) return;
  const int64_t each = job.norm_heads ? job.size : heads * job.size;
  for (int64_t at = 0; at < heads * job.size; at += each) loops().norm(x + at, weight, each, job.eps, x + at);
}

}  // namespace

int attention(const mopeq_attention_job &job) {
  if (const int wrong = check_job(job)) return wrong;
  release();  // what a prompt needed
  const int64_t n = job.hidden, q_width = job.heads * job.size, kv_width = job.kv_heads * job.size;
  const int64_t whole[] = {0, 1}, first = 0;
  Product projections[] = {job.q, job.k, job.v}, back(job.o);
  const int64_t widths[] = {q_width, kv_width, kv_width};
  for (int i = 0; i < 3; i++)
    if (const int wrong = projections[i].plan(whole, n, widths[i])) return wrong;
  if (const int wrong = back.plan(whole, q_width, n)) return wrong;
  for (const Product &one : {projections[0], projections[1], projections[2], back})
    if (one.wants_rotated) return MOPEQ_BITS;

  std::vector<float> row(size_t(n), 0.0f), q(size_t(q_width), 0.0f), k(size_t(kv_width), 0.0f), v(size_t(kv_width), 0.0f);
  if (job.add) {
    loops().widen(job.add, job.type, n, row.data());
    add(row.data(), n, job.x);
  }
  loops().norm(job.x, job.norm_before, n, job.eps, row.data());
  const Digits digits{job.digits, job.coarse};
  const Inputs in(1, n, digits);
  fill(in, 1, copy_row, &row);
  float *const made[] = {q.data(), k.data(), v.data()};
  for (int i = 0; i < 3; i++) projections[i].x = &in, projections[i].rows = &first, projections[i].out = made[i];
  run(projections, 3, job.threads);

  add(job.q_bias, q_width, q.data());
  add(job.k_bias, kv_width, k.data());
  add(job.v_bias, kv_width, v.data());
  norms(q.data(), job.q_norm, job.heads, job);
  norms(k.data(), job.k_norm, job.kv_heads, job);
  for (int64_t h = 0; h < job.heads; h++) rotate(q.data() + h * job.size, job.cos, job.sin, job.rotated);
  for (float &number : q) number *= job.scale;
  for (int64_t h = 0; h < job.kv_heads; h++) {
    rotate(k.data() + h * job.size, job.cos, job.sin, job.rotated);
    const int64_t at = (h * job.room + job.position) * job.size * size_of(job.type);
    loops().narrow(k.data() + h * job.size, job.type, job.size, static_cast<char *>(job.keys) + at);
    loops().narrow(v.data() + h * job.size, job.type, job.size, static_cast<char *>(job.values) + at);
  }

  std::vector<float> mixed(size_t(q_width), 0.0f);
  Heads context{&job, q.data(), mixed.data()};
  run(job.heads, (job.position + 1) * q_width < SHORT ? 1 : job.threads, heads, &context);
  const Inputs between(1, q_width, digits);
  fill(between, 1, copy_row, &mixed);
  back.x = &between, back.rows = &first, back.out = row.data();
  run(&back, 1, job.threads);
  add(row.data(), n, job.x);
  add(job.o_bias, n, job.x);
  loops().norm(job.x, job.norm_after, n, job.eps, row.data());
  loops().narrow(row.data(), job.type, n, job.h);
  return MOPEQ_OK;
}

}  // namespace mopeq
