#pragma once
// Output type and shape of inferos::CompressedAttention for ONNX Runtime's shape inference.

#include "ort/ort_abi.hpp"

namespace inferos::ort {

// Sets query's type and [batch][S][heads * D], symbolic dimensions kept; leaves the shape unknown where it cannot be told.
// ONNX Runtime calls this through the first registered overload whatever the node's type is, so the type comes from the query.
Status* infer_output_shape(Api api, ShapeContext* context) noexcept;

}  // namespace inferos::ort
