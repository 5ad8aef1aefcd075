#include "bindings/bindings.hpp"

PYBIND11_MODULE(_core, m) {
  m.doc() = "Native core of inferos: kernels, arena, sequence cache.";
  inferos::bindings::add_errors(m);
  inferos::bindings::add_kernels(m);
  auto kernels = m.attr("kernels").cast<pybind11::module_>();
  inferos::bindings::add_attend(kernels);
  inferos::bindings::add_read(kernels);
  inferos::bindings::add_cache(m);
}
