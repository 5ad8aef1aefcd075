#include "kernels/logits.hpp"

#include <array>

#include "kernels/dispatch.hpp"
#include "kernels/tables.hpp"

namespace inferos::kernels {

std::span<const Logits> logits_runnable() {
  static const std::array all{
      scalar::kLogits,
#if defined(INFEROS_X86)
      avx2::kLogits,
      avx512vnni::kLogits,
#endif
  };
  static const std::span<const Logits> runnable = runnable_of(std::span<const Logits>(all));
  return runnable;
}

const Logits& logits() {
  static const Logits& table = active_of(logits_runnable());
  return table;
}

}  // namespace inferos::kernels
