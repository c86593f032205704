// The Python module. It carries no operator, only how it was built; loading it registers what operators.cpp defines.
// Beside it torch 2.10's copy of pybind11 refuses to be included; no torch header is included here.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "warp.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "minTER's compiled warp; importing it registers torch.ops.minter.warp";
  module.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = __VERSION__;
        info["torch"] = MINTER_TORCH;
#ifdef MINTER_CUDA
        info["cuda_architectures"] = std::string(MINTER_CUDA);
#else
        info["cuda_architectures"] = pybind11::none();
#endif
        return info;
      },
      "How this module was built: compiler, torch version, CUDA architectures (None: without CUDA).");
  module.def(
      "cpu_targets", &minter::cpu_targets,
      "The instructions the CPU kernel uses (avx512, avx2 or portable), followed by all this processor can run.");
  module.def(
      "set_cpu_target",
      [](const std::string& name) {
        if (!minter::set_cpu_target(name)) throw pybind11::value_error("this processor has no '" + name + "'");
      },
      "Makes the CPU kernel use these instructions, for tests and benchmarks; the results are the same bit for bit.");
}
