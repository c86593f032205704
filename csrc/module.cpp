// The Python module. It carries no operator, only how it was built; loading it registers what operators.cpp defines.
#undef TORCH_TARGET_VERSION  // beside which torch 2.10's copy of pybind11 refuses to be included; no torch header is, here
#include <pybind11/pybind11.h>

#include <string>

PYBIND11_MODULE(minter_warp, module) {
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
}
