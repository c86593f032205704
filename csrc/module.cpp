// The Python module. It carries no operator, only how it was built; loading it registers what operators.cpp defines.
#undef TORCH_TARGET_VERSION  // beside which torch 2.10's copy of pybind11 refuses to be included; no torch header is, here
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
  module.def(
      "keep_memory",
      [](int64_t limit) {
        if (limit < 0) throw pybind11::value_error("keep_memory takes a number of bytes, 0 or more");
        return minter::keep_memory(limit);
      },
      pybind11::arg("limit"),
      "Sets how many bytes of freed outputs on the CPU, of more than 32 MiB each, this process keeps for later ones (at\n"
      "first 2 GiB, or an eighth of the machine's memory where that is less), and returns the limit there was. What is\n"
      "kept beyond it is freed: keep_memory(0) frees all and keeps none. Nothing is kept before torch 2.11 and elsewhere\n"
      "than on Linux.");
}
