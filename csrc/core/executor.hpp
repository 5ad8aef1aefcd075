#pragma once
// Where parallel work runs: ONNX Runtime's own pool inside the op, the process's own pool in the plain API.

#include <cstddef>

namespace inferos {

class Executor {
 public:
  virtual ~Executor() = default;
  // Calls fn(context, i) once for every i in 0..count-1, in any order, and returns when all are done. fn does not throw.
  virtual void parallel_for(std::size_t count, void (*fn)(void* context, std::size_t i), void* context) = 0;
  // How many calls can run at the same time; a hint for how finely to split.
  virtual std::size_t concurrency() const noexcept = 0;
};

class SerialExecutor final : public Executor {
 public:
  void parallel_for(std::size_t count, void (*fn)(void*, std::size_t), void* context) override {
    for (std::size_t i = 0; i < count; ++i) fn(context, i);
  }
  std::size_t concurrency() const noexcept override { return 1; }
};

}  // namespace inferos
