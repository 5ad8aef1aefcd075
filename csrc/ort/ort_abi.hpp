#pragma once
// The part of ONNX Runtime's C ABI that a custom op needs, declared by index: the wheels ship no headers.
//
// OrtApi is a table of function pointers that only ever grows at its end, so an index means the same function in every release
// that has it. We ask for version 18, which has all that is used here; 1.24.4 and 1.31.1 are tested.
// Two copies of ONNX Runtime can live in one process (the Python module has its own), so the table is never global: whoever calls
// us passes it in, and a kernel keeps the one it was created with.

#include <cstddef>
#include <cstdint>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "core/error.hpp"
#include "core/executor.hpp"

#if defined(_WIN32)
#define INFEROS_EXPORT __declspec(dllexport)
#else
#define INFEROS_EXPORT __attribute__((visibility("default")))
#endif

namespace inferos::ort {

inline constexpr std::uint32_t kApiVersion = 18;

struct Status;  // opaque to us: ONNX Runtime's own objects
struct Value;
struct KernelInfo;
struct KernelContext;
struct TypeShape;
struct ShapeContext;
struct SessionOptions;
struct OpDomain;
struct OpAttribute;
using ApiEntry = void (*)();

struct ApiBase {
  const ApiEntry* (*get_api)(std::uint32_t version);
  const char* (*version_string)();
};

enum class ApiIndex : std::size_t {
  kCreateStatus = 0,
  kGetErrorMessage = 2,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kCreateTypeShape = 57,
  kSetElementType = 58,
  kSetDimensions = 59,
  kGetElementType = 60,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetSymbolicDimensions = 63,
  kGetTensorTypeAndShape = 65,
  kAttributeFloat = 85,
  kAttributeInt64 = 86,
  kContextInput = 90,
  kContextOutput = 91,
  kReleaseStatus = 93,
  kReleaseTypeShape = 99,
  kReleaseCustomOpDomain = 101,
  kNodeName = 244,
  kShapeContextInput = 268,
  kShapeContextAttribute = 269,
  kShapeContextOutput = 270,
  kSetSymbolicDimensions = 271,
  kReadOpAttribute = 272,
  kParallelFor = 274,
};

enum class ElementType : int { kUndefined = 0, kFloat = 1, kInt32 = 6, kInt64 = 7, kFloat16 = 10 };
enum class StatusCode : int { kFail = 1 };
enum class Characteristic : int { kRequired = 0, kOptional = 1 };

// OrtCustomOp as of version 18. ONNX Runtime reads members beyond ours only where `version` says they exist.
struct OpTable {
  std::uint32_t version;
  void* (*create_kernel)(const OpTable*, const ApiEntry*, const KernelInfo*);
  const char* (*name)(const OpTable*);
  const char* (*execution_provider)(const OpTable*);
  ElementType (*input_type)(const OpTable*, std::size_t);
  std::size_t (*input_count)(const OpTable*);
  ElementType (*output_type)(const OpTable*, std::size_t);
  std::size_t (*output_count)(const OpTable*);
  void (*compute)(void* kernel, KernelContext*);
  void (*destroy_kernel)(void* kernel);
  Characteristic (*input_characteristic)(const OpTable*, std::size_t);
  Characteristic (*output_characteristic)(const OpTable*, std::size_t);
  int (*input_memory_type)(const OpTable*, std::size_t);
  int (*variadic_input_min_arity)(const OpTable*);
  int (*variadic_input_homogeneity)(const OpTable*);
  int (*variadic_output_min_arity)(const OpTable*);
  int (*variadic_output_homogeneity)(const OpTable*);
  Status* (*create_kernel_v2)(const OpTable*, const ApiEntry*, const KernelInfo*, void** kernel);
  Status* (*compute_v2)(void* kernel, KernelContext*);
  Status* (*infer_output_shape)(const OpTable*, ShapeContext*);
  int (*start_version)(const OpTable*);
  int (*end_version)(const OpTable*);
  std::size_t (*may_inplace)(int** inputs, int** outputs);
  void (*release_may_inplace)(int* inputs, int* outputs);
  std::size_t (*alias_map)(int** inputs, int** outputs);
  void (*release_alias_map)(int* inputs, int* outputs);
};

static_assert(std::is_standard_layout_v<OpTable> && std::is_trivial_v<OpTable>);
static_assert(sizeof(void*) == 8 && sizeof(ElementType) == sizeof(int), "the table below is laid out for 64-bit ABIs");
static_assert(sizeof(OpTable) == 26 * sizeof(void*));
static_assert(offsetof(OpTable, create_kernel) == 1 * sizeof(void*));
static_assert(offsetof(OpTable, compute) == 8 * sizeof(void*));
static_assert(offsetof(OpTable, create_kernel_v2) == 17 * sizeof(void*));
static_assert(offsetof(OpTable, infer_output_shape) == 19 * sizeof(void*));
static_assert(offsetof(OpTable, release_alias_map) == 25 * sizeof(void*));

// A view of one ONNX Runtime's table. Copyable, thread-safe.
class Api {
 public:
  explicit Api(const ApiEntry* table) noexcept : table_(table) {}

  template <ApiIndex kIndex, class Result, class... Args>
  Result call(Args... args) const {
    return reinterpret_cast<Result (*)(Args...)>(table_[static_cast<std::size_t>(kIndex)])(args...);
  }

  // Calls a function that returns a status; throws its message as Error{kUnsupported}.
  template <ApiIndex kIndex, class... Args>
  void checked(Args... args) const {
    if (Status* status = call<kIndex, Status*>(args...)) {
      const std::string message = call<ApiIndex::kGetErrorMessage, const char*>(static_cast<const Status*>(status));
      release(status);
      throw Error(ErrorCode::kUnsupported, "ONNX Runtime: " + message);
    }
  }

  // Calls a function that returns a status; true where it succeeded. For what may be absent.
  template <ApiIndex kIndex, class... Args>
  bool succeeded(Args... args) const noexcept {
    Status* status = call<kIndex, Status*>(args...);
    if (status) release(status);
    return status == nullptr;
  }

  Status* status(const char* message) const noexcept {
    return call<ApiIndex::kCreateStatus, Status*>(StatusCode::kFail, message);
  }

 private:
  void release(Status* status) const noexcept { call<ApiIndex::kReleaseStatus, void>(status); }

  const ApiEntry* table_;
};

// Element type and shape of a tensor, owned.
class TypeShapeInfo {
 public:
  TypeShapeInfo(Api api, TypeShape* info) noexcept : api_(api), info_(info) {}
  ~TypeShapeInfo() { api_.call<ApiIndex::kReleaseTypeShape, void>(info_); }
  TypeShapeInfo(const TypeShapeInfo&) = delete;
  TypeShapeInfo& operator=(const TypeShapeInfo&) = delete;

  TypeShape* get() const noexcept { return info_; }

  std::vector<std::int64_t> dimensions() const {
    std::size_t rank = 0;
    api_.checked<ApiIndex::kGetDimensionsCount>(static_cast<const TypeShape*>(info_), &rank);
    std::vector<std::int64_t> dims(rank);
    api_.checked<ApiIndex::kGetDimensions>(static_cast<const TypeShape*>(info_), dims.data(), rank);
    return dims;
  }

 private:
  Api api_;
  TypeShape* info_;
};

// ONNX Runtime's own threads, for as long as one compute call lasts.
class PoolExecutor final : public Executor {
 public:
  PoolExecutor(Api api, const KernelContext* context) noexcept : api_(api), context_(context) {}

  void parallel_for(std::size_t count, void (*fn)(void*, std::size_t), void* context) override {
    if (count == 1) return fn(context, 0);
    if (count == 0) return;
    api_.checked<ApiIndex::kParallelFor>(context_, fn, count, std::size_t{0}, context);
  }

  // The pool does not tell its size; the machine's is a fair hint.
  std::size_t concurrency() const noexcept override {
    const std::size_t threads = std::thread::hardware_concurrency();
    return threads > 0 ? threads : 1;
  }

 private:
  Api api_;
  const KernelContext* context_;
};

}  // namespace inferos::ort
