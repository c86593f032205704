// The warp on CUDA: one launch, one thread for each output pixel and all its channels, stores coalesced along a row.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <type_traits>

#include <cuda_runtime.h>

#include "warp.h"

namespace minter {
namespace {

using BFloat16 = torch::headeronly::BFloat16;

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;  // beyond this each block takes several tiles

template <typename Out, typename Real>
__device__ __forceinline__ Out convert(Real value) {
  if constexpr (std::is_same_v<Out, uint8_t>) {
    return static_cast<uint8_t>(rint(fmin(fmax(value, Real(0)), Real(255))));
  } else {
    return static_cast<Out>(value);
  }
}

template <typename Real, typename In, typename Out>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Warp w, Out* __restrict__ output) {
  const int64_t pixels = w.height * w.width, total = w.batch * pixels;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += stride) {
    const int64_t n = i / pixels, pixel = i - n * pixels;
    const View view = load_view(w, n);
    const Point point = source_point(load_coefficients(w, n), pixel / w.width, pixel % w.width);
    Out* out = output + n * w.channels * pixels + pixel;
    if (view.image < 0) {  // an index out of range, which cannot raise from here without a synchronisation
      for (int64_t c = 0; c < w.channels; ++c) out[c * pixels] = convert<Out>(static_cast<Real>(nan("")));  // uint8: 0
    } else if (inside(view, point)) {
      const Taps<Real> t = taps<Real>(w, view, point);
      for (int64_t c = 0; c < w.channels; ++c) {
        out[c * pixels] = convert<Out>(normalized(w, bilinear<Real, In>(w, t, c), c));
      }
    } else {
      for (int64_t c = 0; c < w.channels; ++c) {
        out[c * pixels] = convert<Out>(normalized(w, static_cast<Real>(w.fill), c));
      }
    }
  }
}

// One block for each image, so that the sums over its pixels need no atomics and come out the same every time. The
// gradient of the images scatters with atomics: its last bits depend on the order.
template <typename Real, typename In>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Warp w, const Real* __restrict__ grad_output,
                                                            In* grad_images, double* grad_coefficients) {
  __shared__ double shared[8][kThreads / 32];
  const int64_t pixels = w.height * w.width;
  for (int64_t n = blockIdx.x; n < w.batch; n += gridDim.x) {
    const Coefficients coefficients = load_coefficients(w, n);
    const View view = load_view(w, n);
    Warp target = w;
    target.stride_n = w.channels * pixels, target.stride_h = w.width, target.stride_w = 1;
    const Real* grad = grad_output + n * w.channels * pixels;
    double sums[8] = {};
    for (int64_t i = threadIdx.x; i < pixels && view.image >= 0; i += kThreads) {
      const Point point = source_point(coefficients, i / w.width, i % w.width);
      if (!inside(view, point)) continue;
      if (grad_coefficients) {
        double du = 0, dv = 0;
        point_gradient<Real, In>(w, taps<Real>(w, view, point), [&](int64_t c) { return grad[c * pixels + i]; }, du, dv);
        add_coefficient_gradient(point, du, dv, sums);
      }
      if constexpr (!std::is_same_v<In, uint8_t>) {
        if (grad_images) {
          const Taps<Real> t = taps<Real>(target, view, point);
          for (int k = 0; k < 4; ++k) {
            if (t.at[k] < 0) continue;
            for (int64_t c = 0; c < w.channels; ++c) {
              const Real scale = w.scale ? static_cast<Real>(w.scale[c]) : Real(1);
              atomicAdd(&grad_images[t.at[k] + c * pixels], grad[c * pixels + i] * scale * tap_weight(t, k));
            }
          }
        }
      }
    }
    if (grad_coefficients) {
      for (int k = 0; k < 8; ++k) {
        for (int lanes = 16; lanes > 0; lanes /= 2) sums[k] += __shfl_down_sync(0xffffffffu, sums[k], lanes);
        if (threadIdx.x % 32 == 0) shared[k][threadIdx.x / 32] = sums[k];
      }
      __syncthreads();
      if (threadIdx.x < 8) {
        double sum = 0;
        for (int warp = 0; warp < kThreads / 32; ++warp) sum += shared[threadIdx.x][warp];
        grad_coefficients[n * 8 + threadIdx.x] = sum;
      }
      __syncthreads();
    }
  }
}

template <typename Real, typename In, typename Out>
void forward(const Warp& w, void* output, cudaStream_t stream) {
  const int64_t blocks = std::min((w.batch * w.height * w.width + kThreads - 1) / kThreads, kMaxBlocks);
  if (blocks == 0) return;
  forward_kernel<Real, In, Out><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(w, static_cast<Out*>(output));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename Real, typename In>
void backward(const Warp& w, const void* grad, void* grad_images, double* grad_coefficients, cudaStream_t stream) {
  const int64_t blocks = std::min(w.batch, kMaxBlocks);
  if (blocks == 0) return;
  backward_kernel<Real, In><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      w, static_cast<const Real*>(grad), static_cast<In*>(grad_images), grad_coefficients);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

void warp_cuda(const Warp& w, Type in, Type out, void* output, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (in == Type::float64) return forward<double, double, double>(w, output, stream);
  if (in == Type::float32 && out == Type::float32) return forward<float, float, float>(w, output, stream);
  if (in == Type::float32) return forward<float, float, BFloat16>(w, output, stream);
  if (out == Type::uint8) return forward<float, uint8_t, uint8_t>(w, output, stream);
  if (out == Type::float32) return forward<float, uint8_t, float>(w, output, stream);
  return forward<float, uint8_t, BFloat16>(w, output, stream);
}

void warp_backward_cuda(const Warp& w, Type in, const void* grad, void* grad_images, double* grad_coefficients,
                        void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (in == Type::float64) return backward<double, double>(w, grad, grad_images, grad_coefficients, stream);
  if (in == Type::float32) return backward<float, float>(w, grad, grad_images, grad_coefficients, stream);
  return backward<float, uint8_t>(w, grad, grad_images, grad_coefficients, stream);
}

}  // namespace minter
