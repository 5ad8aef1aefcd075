// _core.kernels.ReadBuffer: memory that benchmarks read at the machine's own speed.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "bindings/bindings.hpp"
#include "core/aligned_buffer.hpp"
#include "core/checked.hpp"
#include "core/parts.hpp"
#include "core/thread_pool.hpp"
#include "kernels/read.hpp"

namespace inferos::bindings {
namespace {

using kernels::kReadStep;

// A range in equal slices, shared out as those of attention are, and the exclusive or of those done so far.
struct Slices {
  std::uint64_t (*fold)(const std::byte* p, std::size_t n) noexcept;
  const std::byte* data;
  std::size_t steps;
  std::size_t count;
  Parts parts;
  std::atomic<std::uint64_t> all{0};

  static void run(void* context, std::size_t own) {
    auto& slices = *static_cast<Slices*>(context);
    slices.parts.work(own, [&slices](std::size_t i, std::size_t) noexcept {
      const std::size_t first = slices.steps * i / slices.count;
      const std::size_t last = slices.steps * (i + 1) / slices.count;
      slices.all.fetch_xor(slices.fold(slices.data + first * kReadStep, (last - first) * kReadStep));
    });
  }
};

class ReadBuffer {
 public:
  explicit ReadBuffer(std::int64_t bytes)
      : buffer_(AlignedBuffer::map(rounded(checked_range(bytes, 1, kMost, "bytes"), kHugePageBytes), true)) {
    if (buffer_.data() == nullptr) throw Error(ErrorCode::kBudget, "bytes: no memory for " + std::to_string(bytes));
    const py::gil_scoped_release unlocked;
    // Pages that nobody wrote are all one and the same page of zeros.
    for (std::size_t i = 0; i * sizeof(std::uint64_t) < buffer_.size(); ++i) {
      const std::uint64_t word = i * kWord;
      std::memcpy(buffer_.data() + i * sizeof(word), &word, sizeof(word));
    }
  }

  std::size_t size() const noexcept { return buffer_.size(); }
  bool huge() const noexcept { return buffer_.huge(); }

  std::uint64_t read(std::int64_t offset, std::int64_t bytes, const std::string& isa) const {
    const std::size_t first = checked_range(offset, 0, static_cast<std::int64_t>(size()), "offset");
    const std::size_t count = checked_range(bytes, 0, static_cast<std::int64_t>(size() - first), "bytes");
    if (first % kReadStep != 0 || count % kReadStep != 0) {
      throw Error(ErrorCode::kShape, "read: offset is " + std::to_string(offset) + " and bytes " +
                                         std::to_string(bytes) + ", wanted multiples of " + std::to_string(kReadStep));
    }
    ThreadPool& pool = ThreadPool::process();
    const std::size_t threads = pool.concurrency();
    const std::size_t slice_count = threads == 1 ? 1 : threads * kSlicesPerThread;
    Slices slices{table(isa).fold, buffer_.data() + first, count / kReadStep, slice_count, Parts(slice_count, threads)};
    const py::gil_scoped_release unlocked;
    pool.parallel_for(slices.parts.size(), &Slices::run, &slices);
    return slices.all.load();
  }

 private:
  static constexpr std::uint64_t kWord = 0x9E3779B97F4A7C15;  // odd: no two words are equal
  static constexpr std::int64_t kMost = std::int64_t{1} << 40;

  static constexpr std::size_t kSlicesPerThread = 4;  // a thread that wakes late is helped out

  static std::size_t rounded(std::size_t value, std::size_t step) { return (value + step - 1) / step * step; }

  static const kernels::Read& table(const std::string& isa) {
    const auto runnable = kernels::read_runnable();
    if (isa.empty()) return runnable.back();
    const auto found =
        std::find_if(runnable.begin(), runnable.end(), [&](const auto& each) { return isa_name(each.isa) == isa; });
    if (found == runnable.end()) throw Error(ErrorCode::kConfig, "isa: '" + isa + "' cannot run here");
    return *found;
  }

  AlignedBuffer buffer_;
};

}  // namespace

void add_read(py::module_& m) {
  py::class_<ReadBuffer>(m, "ReadBuffer", "Memory to read, in huge pages where the system gives them.")
      .def(py::init<std::int64_t>(), py::arg("bytes"))
      .def_property_readonly("size", &ReadBuffer::size)
      .def_property_readonly("huge", &ReadBuffer::huge)
      .def("read", &ReadBuffer::read, py::arg("offset"), py::arg("bytes"), py::arg("isa") = "",
           "Reads every byte once; the exclusive or of its words of 64 bits.");
}

}  // namespace inferos::bindings
