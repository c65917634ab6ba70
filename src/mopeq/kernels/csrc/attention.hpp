#pragma once
#include "mopeq_cpu.h"

namespace mopeq {

int attention(const mopeq_attention_job &job);

}  // namespace mopeq
