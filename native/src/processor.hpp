// The machine under this process, in the system's words: dnp/engine/system/processor.py.
#pragma once

#include <string>

namespace dnp::core {

int core_count();  // physical cores that this process may use: affinity and quota are respected

// Machine, name and vector units, as plans for it say: "x86_64 AMD EPYC (avx avx2 fma)".
std::string processor_architecture();

}  // namespace dnp::core
