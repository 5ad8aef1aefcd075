#include "kernels/hadamard.hpp"

#include <array>

#include "kernels/dispatch.hpp"
#include "kernels/tables.hpp"

namespace inferos::kernels {

std::span<const Hadamard> hadamard_runnable() {
  static const std::array all{
      scalar::kHadamard,
#if defined(INFEROS_X86)
      avx2::kHadamard,
      avx512vnni::kHadamard,
#endif
  };
  static const std::span<const Hadamard> runnable = runnable_of(std::span<const Hadamard>(all));
  return runnable;
}

const Hadamard& hadamard() {
  static const Hadamard& table = active_of(hadamard_runnable());
  return table;
}

}  // namespace inferos::kernels
