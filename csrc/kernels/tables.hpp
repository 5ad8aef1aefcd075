#pragma once
// The kernel tables that the files of scalar/, avx2/ and avx512vnni/ define; only the dispatch files read them.

#include "kernels/hadamard.hpp"
#include "kernels/importance.hpp"
#include "kernels/logits.hpp"
#include "kernels/panels.hpp"
#include "kernels/quantize.hpp"
#include "kernels/read.hpp"

namespace inferos::kernels::scalar {
extern const Convert kConvert;
extern const Quantize kQuantize;
extern const Hadamard kHadamard;
extern const Importance kImportance;
extern const Logits kLogits;
extern const Panels kPanels;
extern const Read kRead;
}  // namespace inferos::kernels::scalar

namespace inferos::kernels::avx2 {
extern const Convert kConvert;
extern const Quantize kQuantize;
extern const Hadamard kHadamard;
extern const Importance kImportance;
extern const Logits kLogits;
extern const Panels kPanels;
extern const Read kRead;
}  // namespace inferos::kernels::avx2

namespace inferos::kernels::avx512vnni {
extern const Convert kConvert;
extern const Quantize kQuantize;
extern const Hadamard kHadamard;
extern const Importance kImportance;
extern const Logits kLogits;
extern const Read kRead;
}  // namespace inferos::kernels::avx512vnni
