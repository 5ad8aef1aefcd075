#include "kernels/quantize.hpp"

#include <array>

#include "kernels/dispatch.hpp"
#include "kernels/tables.hpp"

namespace inferos::kernels {

std::span<const Quantize> quantize_runnable() {
  static const std::array all{
      scalar::kQuantize,
#if defined(INFEROS_X86)
      avx2::kQuantize,
      avx512vnni::kQuantize,
#endif
  };
  static const std::span<const Quantize> runnable = runnable_of(std::span<const Quantize>(all));
  return runnable;
}

const Quantize& quantize() {
  static const Quantize& table = active_of(quantize_runnable());
  return table;
}

}  // namespace inferos::kernels
