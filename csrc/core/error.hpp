#pragma once
// The one exception type of the C++ core. `errors.cpp` in csrc/bindings maps each code to a class of inferos/errors.py.

#include <exception>
#include <string>
#include <utility>

namespace inferos {

enum class ErrorCode {
  kConfig,       // ConfigError: an option is unknown or out of range
  kShape,        // ShapeError: sizes that do not fit together
  kBudget,       // BudgetError: the arena's byte budget would be exceeded; nothing was changed
  kClosed,       // ClosedError: the handle is unknown, closed, or of an older generation
  kBusy,         // BusyError: two threads use one sequence at the same time
  kRewind,       // RewindError: the position cannot be reached any more
  kSequence,     // SequenceError: a call in the wrong order (append without begin, a layer twice in a step, a gap)
  kUnsupported,  // UnsupportedError: a form this build does not compute
};

class Error : public std::exception {
 public:
  Error(ErrorCode code, std::string what) : code_(code), what_(std::move(what)) {}
  ErrorCode code() const noexcept { return code_; }
  const char* what() const noexcept override { return what_.c_str(); }

 private:
  ErrorCode code_;
  std::string what_;
};

}  // namespace inferos
