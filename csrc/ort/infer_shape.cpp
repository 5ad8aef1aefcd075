#include "ort/infer_shape.hpp"

#include <exception>

#include "ort/step_inputs.hpp"

namespace inferos::ort {
namespace {

// An integer attribute of the node, 0 where it is absent.
std::int64_t attribute(Api api, const ShapeContext* context, const char* name) {
  constexpr int kInt64 = 1;  // OrtOpAttrType
  const OpAttribute* found = nullptr;
  if (!api.succeeded<ApiIndex::kShapeContextAttribute>(context, name, &found)) return 0;
  std::int64_t value = 0;
  std::size_t written = 0;
  const bool read =
      api.succeeded<ApiIndex::kReadOpAttribute>(found, kInt64, static_cast<void*>(&value), sizeof value, &written);
  return read ? value : 0;
}

// Borrowed from the context.
const TypeShape* input(Api api, const ShapeContext* context, Input index) {
  TypeShape* info = nullptr;
  api.checked<ApiIndex::kShapeContextInput>(context, static_cast<std::size_t>(index), &info);
  return info;
}

// 0 where the input is absent or of unknown shape.
std::size_t rank_of(Api api, const TypeShape* info) {
  std::size_t rank = 0;
  if (info) api.checked<ApiIndex::kGetDimensionsCount>(info, &rank);
  return rank;
}

void infer(Api api, ShapeContext* context) {
  const TypeShape* query = input(api, context, Input::kQuery);
  if (rank_of(api, query) != 3) return;
  std::int64_t dims[3];
  const char* names[3] = {"", "", ""};
  api.checked<ApiIndex::kGetDimensions>(query, static_cast<std::int64_t*>(dims), std::size_t{3});
  api.checked<ApiIndex::kGetSymbolicDimensions>(query, static_cast<const char**>(names), std::size_t{3});
  // A key without a known shape looks the same as none at all; then only the node's own head_dim tells the width.
  const std::int64_t width = attribute(api, context, "num_heads") * attribute(api, context, "head_dim");
  if (width > 0) {
    dims[2] = width;
  } else if (rank_of(api, input(api, context, Input::kKey)) != 3) {
    return;
  }
  for (std::size_t i = 0; i < 3; ++i) {
    if (dims[i] < 0 && (!names[i] || !*names[i])) return;
  }
  ElementType type{};
  api.checked<ApiIndex::kGetElementType>(query, &type);
  TypeShape* raw = nullptr;
  api.checked<ApiIndex::kCreateTypeShape>(&raw);
  const TypeShapeInfo shape(api, raw);
  api.checked<ApiIndex::kSetElementType>(raw, type);
  api.checked<ApiIndex::kSetDimensions>(raw, static_cast<const std::int64_t*>(dims), std::size_t{3});
  api.checked<ApiIndex::kSetSymbolicDimensions>(raw, static_cast<const char**>(names), std::size_t{3});
  api.checked<ApiIndex::kShapeContextOutput>(static_cast<const ShapeContext*>(context), std::size_t{0},
                                             static_cast<const TypeShape*>(raw));
}

}  // namespace

Status* infer_output_shape(Api api, ShapeContext* context) noexcept {
  try {
    infer(api, context);
    return nullptr;
  } catch (const std::exception& error) {
    return api.status(error.what());
  }
}

}  // namespace inferos::ort
