// The Python module of one instruction-set level: collects the binders of all kernel files.
#include "hasten.h"

namespace {

// Names of the instruction sets this CPU offers, from the compiler's CPUID support.
nb::dict cpu_features() {
  nb::dict out;
#if defined(__x86_64__)
  __builtin_cpu_init();
  out["avx2"] = bool(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"));
  out["avx512"] = bool(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                       __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vpopcntdq"));
#endif
  return out;
}

}  // namespace

NB_MODULE(HASTEN_MODULE, m) {
  m.attr("level") = HASTEN_LEVEL_NAME;
  m.def("cpu_features", &cpu_features);
  for (const hasten::Binder* b = hasten::Binder::head; b != nullptr; b = b->next) b->run(m);
}
