#include "kernels/quantize.hpp"

#include <array>

#include "kernels/dispatch.hpp"
#include "kernels/tables.hpp"

namespace inferos::kernels {

std::span<const Convert> convert_runnable() {
  static const std::array all{
      scalar::kConvert,
#if defined(INFEROS_X86)
      avx2::kConvert,
      avx512vnni::kConvert,
#endif
  };
  static const std::span<const Convert> runnable = runnable_of(std::span<const Convert>(all));
  return runnable;
}

const Convert& convert() {
  static const Convert& table = active_of(convert_runnable());
  return table;
}

}  // namespace inferos::kernels
