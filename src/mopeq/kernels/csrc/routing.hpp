#pragma once
#include "mopeq_cpu.h"

namespace mopeq {

int moe(const mopeq_moe_job &job);

}  // namespace mopeq
