#pragma once
// The only folder that includes pybind11. Each function adds one room's classes and functions to the module.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "core/error.hpp"

namespace inferos::bindings {

namespace py = pybind11;

py::object error_object(const Error& error);  // an instance of the matching class of inferos.errors

void add_errors(py::module_& m);   // inferos::Error -> inferos.errors
void add_kernels(py::module_& m);  // _core.kernels: every ISA's kernels, for tests and hosts
void add_attend(py::module_& m);   // _core.kernels: the attention kernels, added to the module that add_kernels makes
void add_read(py::module_& m);     // _core.kernels: memory to read, for benchmarks
void add_cache(py::module_& m);    // Arena, Cache, AttentionParams: the sequence API

}  // namespace inferos::bindings
