#include "kernels/importance.hpp"

#include <array>

#include "kernels/dispatch.hpp"
#include "kernels/tables.hpp"

namespace inferos::kernels {

std::span<const Importance> importance_runnable() {
  static const std::array all{
      scalar::kImportance,
#if defined(INFEROS_X86)
      avx2::kImportance,
      avx512vnni::kImportance,
#endif
  };
  static const std::span<const Importance> runnable = runnable_of(std::span<const Importance>(all));
  return runnable;
}

const Importance& importance() {
  static const Importance& table = active_of(importance_runnable());
  return table;
}

}  // namespace inferos::kernels
