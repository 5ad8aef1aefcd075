// inferos::Error -> the classes of inferos/errors.py. Nothing else crosses the border (std::bad_alloc is pybind11's MemoryError).

#include <array>
#include <cstddef>
#include <exception>

#include "bindings/bindings.hpp"
#include "core/error.hpp"

namespace inferos::bindings {
namespace {

struct Mapping {
  ErrorCode code;
  const char* name;
};

constexpr std::array kMappings{
    Mapping{ErrorCode::kConfig, "ConfigError"},     Mapping{ErrorCode::kShape, "ShapeError"},
    Mapping{ErrorCode::kBudget, "BudgetError"},     Mapping{ErrorCode::kClosed, "ClosedError"},
    Mapping{ErrorCode::kBusy, "BusyError"},         Mapping{ErrorCode::kRewind, "RewindError"},
    Mapping{ErrorCode::kSequence, "SequenceError"}, Mapping{ErrorCode::kUnsupported, "UnsupportedError"},
};

// Filled when the module is imported; the references are kept for the life of the process, as the module itself is.
std::array<py::handle, kMappings.size()>& classes() {
  static std::array<py::handle, kMappings.size()> loaded;
  return loaded;
}

}  // namespace

py::object error_object(const Error& error) {
  for (std::size_t i = 0; i < kMappings.size(); ++i) {
    if (kMappings[i].code == error.code()) return classes()[i](error.what());
  }
  return py::none();
}

void add_errors(py::module_& /*m*/) {
  const py::module_ errors = py::module_::import("inferos.errors");
  for (std::size_t i = 0; i < kMappings.size(); ++i)
    classes()[i] = py::object(errors.attr(kMappings[i].name)).release();
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const Error& error) {
      const py::object object = error_object(error);
      PyErr_SetObject(py::type::handle_of(object).ptr(), object.ptr());
    }
  });
}

}  // namespace inferos::bindings
