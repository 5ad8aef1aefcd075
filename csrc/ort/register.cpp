// RegisterCustomOps: what ONNX Runtime looks for in a custom op library, and the op's table.

#include <exception>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "core/instances.hpp"
#include "ort/compressed_attention.hpp"
#include "ort/infer_shape.hpp"

namespace inferos::ort {
namespace {

// ONNX Runtime hands the table back to its functions; what they need beyond it stands behind it.
struct Op : OpTable {
  ElementType type;
  const ApiEntry* api;  // of the copy of ONNX Runtime that registered this op; shape inference has no other way to it
};

ElementType input_type(const OpTable* op, std::size_t index) {
  switch (static_cast<Input>(index)) {
    case Input::kLengths:
    case Input::kTotal: return ElementType::kInt32;
    case Input::kPositions:
    case Input::kHandle: return ElementType::kInt64;
    default: return static_cast<const Op*>(op)->type;
  }
}

Characteristic input_characteristic(const OpTable*, std::size_t index) {
  switch (static_cast<Input>(index)) {
    case Input::kKey:
    case Input::kValue:
    case Input::kCosine:
    case Input::kSine:
    case Input::kPositions: return Characteristic::kOptional;
    default: return Characteristic::kRequired;
  }
}

Status* create(const OpTable* op, const ApiEntry* table, const KernelInfo* info, void** kernel) {
  const Api api(table);
  try {
    *kernel = std::make_unique<CompressedAttention>(api, info, static_cast<const Op*>(op)->type).release();
    return nullptr;
  } catch (const std::exception& error) {
    return api.status(error.what());
  }
}

void destroy(void* kernel) { std::default_delete<CompressedAttention>()(static_cast<CompressedAttention*>(kernel)); }

Status* compute(void* kernel, KernelContext* context) {
  return static_cast<const CompressedAttention*>(kernel)->compute(context);
}

Status* infer(const OpTable* op, ShapeContext* context) {
  return infer_output_shape(Api(static_cast<const Op*>(op)->api), context);
}

Op make_op(ElementType type, const ApiEntry* api) noexcept {
  Op op{};
  op.type = type;
  op.api = api;
  op.version = kApiVersion;
  op.name = [](const OpTable*) { return kOpName; };
  op.execution_provider = [](const OpTable*) -> const char* { return nullptr; };  // none named: the CPU's
  op.input_type = input_type;
  op.input_count = [](const OpTable*) { return kInputs; };
  op.output_type = [](const OpTable* self, std::size_t) { return static_cast<const Op*>(self)->type; };
  op.output_count = [](const OpTable*) { return std::size_t{1}; };
  op.input_characteristic = input_characteristic;
  op.output_characteristic = [](const OpTable*, std::size_t) { return Characteristic::kRequired; };
  op.input_memory_type = [](const OpTable*, std::size_t) { return 0; };
  op.variadic_input_min_arity = [](const OpTable*) { return 1; };
  op.variadic_input_homogeneity = op.variadic_input_min_arity;
  op.variadic_output_min_arity = op.variadic_input_min_arity;
  op.variadic_output_homogeneity = op.variadic_input_min_arity;
  op.create_kernel_v2 = create;
  op.compute_v2 = compute;
  op.destroy_kernel = destroy;
  op.infer_output_shape = infer;
  op.start_version = [](const OpTable*) { return 1; };
  op.end_version = [](const OpTable*) { return std::numeric_limits<int>::max(); };
  return op;
}

// The ops and their domain for one copy of ONNX Runtime. Sessions keep pointers into it, so it lives as long as the process.
struct Registration {
  explicit Registration(const ApiEntry* table)
      : api(table), of_float(make_op(ElementType::kFloat, table)), of_float16(make_op(ElementType::kFloat16, table)) {
    api.checked<ApiIndex::kCreateCustomOpDomain>(kOpDomain, &domain);
    api.checked<ApiIndex::kCustomOpDomainAdd>(domain, static_cast<const OpTable*>(&of_float));
    api.checked<ApiIndex::kCustomOpDomainAdd>(domain, static_cast<const OpTable*>(&of_float16));
  }

  Api api;
  Op of_float;
  Op of_float16;
  OpDomain* domain = nullptr;
};

Registration& registration(const ApiEntry* table) {
  static std::mutex mutex;
  static std::map<const ApiEntry*, std::unique_ptr<Registration>> known;
  const std::lock_guard lock(mutex);
  std::unique_ptr<Registration>& entry = known[table];
  if (!entry) entry = std::make_unique<Registration>(table);
  return *entry;
}

}  // namespace
}  // namespace inferos::ort

// Error (a status) where this ONNX Runtime is older than 1.18, or another copy of this library was loaded before. Thread-safe.
extern "C" INFEROS_EXPORT inferos::ort::Status* RegisterCustomOps(inferos::ort::SessionOptions* options,
                                                                  const inferos::ort::ApiBase* base) {
  using namespace inferos::ort;
  const ApiEntry* table = base->get_api(kApiVersion);
  if (!table) return Api(base->get_api(1)).status("inferos needs ONNX Runtime 1.18 or newer");
  const Api api(table);
  try {
    // Sequences that were opened in one copy are unknown to the other: better said here than at the first step.
    if (const std::string first = inferos::earlier_copy(); !first.empty()) {
      const std::string what =
          "libinferos is in this process already, as " + first +
          "; a second copy would not know its sequences. Write the model's folder again: inferos rewrite";
      return api.status(what.c_str());
    }
    api.checked<ApiIndex::kAddCustomOpDomain>(options, registration(table).domain);
    return nullptr;
  } catch (const std::exception& error) {
    return api.status(error.what());
  }
}
