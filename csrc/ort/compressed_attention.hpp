#pragma once
// inferos::CompressedAttention: GroupQueryAttention's meaning without past and present tensors; each row names its cache by a handle.

#include <string>

#include "ort/ort_abi.hpp"
#include "ort/step_inputs.hpp"

namespace inferos::ort {

inline constexpr const char* kOpName = "CompressedAttention";
inline constexpr const char* kOpDomain = "inferos";

// One node of a session. Calls of different sequences may run at the same time; a sequence is held by its Lease.
class CompressedAttention {
 public:
  // Reads and checks the attributes. Throws Error{kShape}.
  CompressedAttention(Api api, const KernelInfo* info, ElementType type);

  // Appends the new keys and values to each row's cache and writes output [batch][S][heads * D]; padding rows become zeros.
  // On failure the error is also kept on every row's handle, because ONNX Runtime flattens it. Throws nothing else.
  Status* compute(KernelContext* context) const noexcept;

 private:
  template <class T>
  void run(KernelContext* context) const;

  Api api_;
  std::string node_;
  ElementType type_;
  Attributes attributes_{};
};

}  // namespace inferos::ort
