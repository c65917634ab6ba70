#pragma once
#include "mopeq_cpu.h"

namespace mopeq {

int experts(const mopeq_experts_job &job);

}  // namespace mopeq
