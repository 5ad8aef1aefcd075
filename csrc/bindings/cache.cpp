#include "bindings/bindings.hpp"
namespace inferos::bindings { void add_cache(py::module_&) {} }
