// minter::warp, minter::warp_out and minter::warp_backward: what they accept, and their registration with PyTorch's
// dispatcher through its stable C++ interface, for torch 2.10 and newer.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <tuple>

#include "warp.h"

namespace minter {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = const std::optional<Tensor>&;

Type type_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return Type::uint8;
    case ScalarType::Float: return Type::float32;
    case ScalarType::Double: return Type::float64;
    case ScalarType::BFloat16: return Type::bfloat16;
    default: STD_TORCH_CHECK(false, "minter::warp: images are uint8, float32 or float64; output also bfloat16");
  }
}

// torch.frombuffer can make tensors that do not begin where their type may.
const void* aligned(const Tensor& tensor, const char* name) {
  const void* data = tensor.const_data_ptr();
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % tensor.element_size() == 0, "minter::warp: ", name,
                  " does not begin at a multiple of its element's size");
  return data;
}

// The data of a contiguous tensor of this type and shape, on the device of the images.
const void* checked(const Tensor& tensor, const Tensor& images, const char* name, ScalarType type,
                    std::initializer_list<int64_t> shape) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = tensor.size(i) == shape.begin()[i];
  STD_TORCH_CHECK(fits, "minter::warp: ", name, " has the wrong shape");
  STD_TORCH_CHECK(tensor.scalar_type() == type, "minter::warp: ", name, " has the wrong type");
  STD_TORCH_CHECK(tensor.is_contiguous(), "minter::warp: ", name, " is to be contiguous");
  STD_TORCH_CHECK(tensor.is_cuda() == images.is_cuda() && tensor.get_device_index() == images.get_device_index(),
                  "minter::warp: ", name, " is on another device than the images");
  return aligned(tensor, name);
}

template <typename T>
const T* checked(Optional tensor, const Tensor& images, const char* name, ScalarType type,
                 std::initializer_list<int64_t> shape) {
  return tensor ? static_cast<const T*>(checked(*tensor, images, name, type, shape)) : nullptr;
}

// Checks everything the kernels rely on.
Warp make_warp(const Tensor& images, Optional coefficients, Optional index, Optional crop, Optional window,
               Optional scale, Optional shift, double fill) {
  STD_TORCH_CHECK(images.dim() == 4, "minter::warp: images are to have 4 dimensions (N, C, H, W)");
  STD_TORCH_CHECK(type_of(images.scalar_type()) != Type::bfloat16,
                  "minter::warp: images are to be uint8, float32 or float64");
  Warp w{};
  w.images = aligned(images, "images");
  w.num_images = images.size(0), w.channels = images.size(1), w.height = images.size(2), w.width = images.size(3);
  w.stride_n = images.stride(0), w.stride_c = images.stride(1), w.stride_h = images.stride(2);
  w.stride_w = images.stride(3);
  w.batch = index ? index->numel() : w.num_images;
  w.fill = fill;
  w.index = checked<int64_t>(index, images, "index", ScalarType::Long, {w.batch});
  w.crop = checked<int64_t>(crop, images, "crop", ScalarType::Long, {w.batch, 3});
  w.window = checked<int64_t>(window, images, "window", ScalarType::Long, {w.batch, 4});
  w.scale = checked<float>(scale, images, "scale", ScalarType::Float, {w.channels});
  w.shift = checked<float>(shift, images, "shift", ScalarType::Float, {w.channels});
  w.double_coefficients = coefficients && coefficients->scalar_type() == ScalarType::Double;
  w.coefficients = checked<void>(coefficients, images, "coefficients",
                                 w.double_coefficients ? ScalarType::Double : ScalarType::Float, {w.batch, 8});
  // More elements than any memory are refused, so that no product overflows.
  double elements = 1;
  for (const int64_t size : {w.batch, w.channels, w.height, w.width}) elements *= static_cast<double>(size);
  STD_TORCH_CHECK(elements <= 1e15, "minter::warp: an output of ", w.batch, " x ", w.channels, " x ", w.height, " x ",
                  w.width, " elements is too large");
  return w;
}

// Images without channels or in a batch of none are not to be walked over, however large they say they are.
bool is_empty(const Warp& w) { return w.batch == 0 || w.channels == 0 || w.height == 0 || w.width == 0; }

void check_types(const Warp& w, Type in, Type out) {
  STD_TORCH_CHECK(in == out || (in != Type::float64 && (out == Type::float32 || out == Type::bfloat16)),
                  "minter::warp: the output is to have the type of the images, or float32 or bfloat16");
  STD_TORCH_CHECK(out != Type::uint8 || (!w.scale && !w.shift),
                  "minter::warp: uint8 output takes no scale and no shift");
}

#ifdef MINTER_CUDA
void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
                  "minter::warp: no current CUDA stream");
  return stream;
}
#endif

void run(const Warp& w, const Tensor& images, Tensor& output) {
  const Type in = type_of(images.scalar_type()), out = type_of(output.scalar_type());
  if (is_empty(w)) return;
#ifdef MINTER_CUDA
  if (images.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
    return warp_cuda(w, in, out, output.mutable_data_ptr(), current_stream(images));
  }
#endif
  warp_cpu(w, in, out, output.mutable_data_ptr());
}

Tensor warp(const Tensor& images, Optional coefficients, Optional index, Optional crop, Optional window, Optional scale,
            Optional shift, double fill, ScalarType dtype) {
  const Warp w = make_warp(images, coefficients, index, crop, window, scale, shift, fill);
  check_types(w, type_of(images.scalar_type()), type_of(dtype));
  Tensor output = torch::stable::new_empty(images, {w.batch, w.channels, w.height, w.width}, dtype);
  run(w, images, output);
  return output;
}

// Whether two tensors take up some of the same memory, as far as their first and last bytes tell.
bool may_overlap(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto end = [](const Tensor& tensor) {
    int64_t last = 0;
    for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
    return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) + (last + 1) * tensor.element_size();
  };
  return reinterpret_cast<uintptr_t>(a.const_data_ptr()) < end(b) &&
         reinterpret_cast<uintptr_t>(b.const_data_ptr()) < end(a);
}

void warp_out(const Tensor& images, Optional coefficients, Optional index, Optional crop, Optional window,
              Optional scale, Optional shift, double fill, Tensor output) {
  const Warp w = make_warp(images, coefficients, index, crop, window, scale, shift, fill);
  check_types(w, type_of(images.scalar_type()), type_of(output.scalar_type()));
  checked(output, images, "out", output.scalar_type(), {w.batch, w.channels, w.height, w.width});
  for (const auto& read : {std::optional<Tensor>(images), coefficients, index, crop, window, scale, shift}) {
    STD_TORCH_CHECK(!read || !may_overlap(*read, output), "minter::warp_out: out shares memory with what is read");
  }
  run(w, images, output);
}

// Gradients with respect to the images (zeros of no elements when not asked for) and the coefficients (likewise).
std::tuple<Tensor, Tensor> warp_backward(const Tensor& grad, const Tensor& images, Optional coefficients,
                                         Optional index, Optional crop, Optional window, Optional scale,
                                         bool images_needed, bool coefficients_needed) {
  const Warp w = make_warp(images, coefficients, index, crop, window, scale, std::nullopt, 0.0);
  const Type in = type_of(images.scalar_type());
  STD_TORCH_CHECK(!images_needed || (in != Type::uint8 && !index),
                  "minter::warp_backward: only float images taken without an index have a gradient");
  const void* from = checked(grad, images, "grad", in == Type::float64 ? ScalarType::Double : ScalarType::Float,
                             {w.batch, w.channels, w.height, w.width});
  using Shape = std::initializer_list<int64_t>;
  Tensor grad_images = torch::stable::new_zeros(
      images, images_needed ? Shape{w.batch, w.channels, w.height, w.width} : Shape{0}, images.scalar_type());
  Tensor grad_coefficients =
      torch::stable::new_zeros(images, coefficients_needed ? Shape{w.batch, 8} : Shape{0}, ScalarType::Double);
  if (is_empty(w)) return {grad_images, grad_coefficients};
  void* to_images = images_needed ? grad_images.mutable_data_ptr() : nullptr;
  double* to_coefficients = coefficients_needed ? grad_coefficients.mutable_data_ptr<double>() : nullptr;
#ifdef MINTER_CUDA
  if (images.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
    warp_backward_cuda(w, in, from, to_images, to_coefficients, current_stream(images));
    return {grad_images, grad_coefficients};
  }
#endif
  warp_backward_cpu(w, in, from, to_images, to_coefficients);
  return {grad_images, grad_coefficients};
}

}  // namespace

STABLE_TORCH_LIBRARY(minter, m) {
  m.def(
      "warp(Tensor images, Tensor? coefficients, Tensor? index, Tensor? crop, Tensor? window, Tensor? scale, "
      "Tensor? shift, float fill, ScalarType dtype) -> Tensor");
  m.def(
      "warp_out(Tensor images, Tensor? coefficients, Tensor? index, Tensor? crop, Tensor? window, Tensor? scale, "
      "Tensor? shift, float fill, Tensor(a!) out) -> ()");
  m.def(
      "warp_backward(Tensor grad, Tensor images, Tensor? coefficients, Tensor? index, Tensor? crop, Tensor? window, "
      "Tensor? scale, bool images_needed, bool coefficients_needed) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(minter, CPU, m) {
  m.impl("warp", TORCH_BOX(&warp));
  m.impl("warp_out", TORCH_BOX(&warp_out));
  m.impl("warp_backward", TORCH_BOX(&warp_backward));
}

#ifdef MINTER_CUDA
STABLE_TORCH_LIBRARY_IMPL(minter, CUDA, m) {
  m.impl("warp", TORCH_BOX(&warp));
  m.impl("warp_out", TORCH_BOX(&warp_out));
  m.impl("warp_backward", TORCH_BOX(&warp_backward));
}
#endif

}  // namespace minter
