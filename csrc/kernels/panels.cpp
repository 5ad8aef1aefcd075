#include "kernels/panels.hpp"

#include <array>

#include "kernels/dispatch.hpp"
#include "kernels/tables.hpp"

namespace inferos::kernels {

std::span<const Panels> panels_runnable() {
  static const std::array all{
      scalar::kPanels,
#if defined(INFEROS_X86)
      avx2::kPanels,
#endif
  };
  static const std::span<const Panels> runnable = runnable_of(std::span<const Panels>(all));
  return runnable;
}

const Panels& panels() {
  static const Panels& table = active_of(panels_runnable());
  return table;
}

}  // namespace inferos::kernels
