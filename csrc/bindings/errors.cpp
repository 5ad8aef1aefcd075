#include "bindings/bindings.hpp"
#include "core/error.hpp"
namespace inferos::bindings {
void add_errors(py::module_&) {
  py::register_exception_translator([](std::exception_ptr p) {
    try { if (p) std::rethrow_exception(p); } catch (const Error& e) {
      py::object m = py::module_::import("inferos.errors");
      py::set_error(m.attr(e.code() == ErrorCode::kShape ? "ShapeError" : "ConfigError"), e.what());
    }
  });
}
}
