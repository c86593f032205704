// The warp on CUDA: one launch, one block for each image (several for a large one), no synchronisation with the host.
// What a block does, step by step, is in warp_steps.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include <cuda_runtime.h>

#include "warp.h"
#include "warp_steps.h"

namespace minter {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;  // beyond this each block takes several tiles

// float64 images: everything in float64, one thread for each pixel of all images.
__global__ void __launch_bounds__(kThreads) float64_kernel(const Warp w, double* __restrict__ output) {
  const int64_t pixels = w.height * w.width, total = w.batch * pixels;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += stride) {
    const int64_t n = i / pixels, pixel = i - n * pixels;
    const View view = load_view(w, n);
    const Point point = source_point(load_coefficients(w, n), pixel / w.width, pixel % w.width);
    double* out = output + n * w.channels * pixels + pixel;
    const bool is_inside = view.image >= 0 && inside(view, point);
    const Taps<double> t = is_inside ? taps<double>(w, view, point) : Taps<double>{};
    // An index out of range, which cannot raise from here without a synchronisation, makes the image NaN.
    const double outside = view.image < 0 ? nan("") : w.fill;
    for (int64_t c = 0; c < w.channels; ++c) {
      out[c * pixels] = normalized(w, is_inside ? bilinear<double, double>(w, t, c) : outside, c);
    }
  }
}

// ----------------------------------------------------------------------------------- uint8 and float32, a block an image

// kPixels: 4 where rows and the output's address are multiples of that, else 1.
template <typename In, typename Out, bool kStaged, int kChannels, int kPixels>
__global__ void __launch_bounds__(kImageThreads, 8) image_kernel(const __grid_constant__ Warp w, bool by_fours,
                                                                 int rows_of_block, Out* __restrict__ output) {
  extern __shared__ uint32_t tile[];
  __shared__ CentredMap shared_map;
  __shared__ Tile shared_tile;
  const int planes = planes_of<In, kChannels>(w), thread = threadIdx.x;
  const int height = static_cast<int>(w.height), first = blockIdx.y * rows_of_block;
  const int past = first + rows_of_block < height ? first + rows_of_block : height;
  for (int64_t n = blockIdx.x; n < w.batch; n += gridDim.x) {
    // What all threads need is made by one of them, and what takes longest by one of another warp meanwhile.
    if (thread == 0) shared_tile = make_tile(w, n);
    if (thread == 32) shared_map = centre(load_coefficients(w, n), load_view(w, n), w.height, w.width);
    __syncthreads();
    const Tile t = shared_tile;  // in registers, as the map below
    Out* out = output + n * w.channels * w.height * w.width;
    if (t.image < 0) {  // an index out of range, which cannot raise from here without a synchronisation
      const int64_t begin = static_cast<int64_t>(first) * w.width, end = static_cast<int64_t>(past) * w.width;
      for (int64_t c = 0; c < w.channels; ++c) {
        for (int64_t i = begin + thread; i < end; i += kImageThreads) {
          out[c * w.height * w.width + i] = converted<Out>(std::is_same_v<Out, uint8_t> ? 0.0f : nanf(""));
        }
      }
    } else {
      if (kStaged && t.rows > 0 && t.columns > 0) {  // otherwise nothing is inside, and the tile is read for nothing
        if (reaches_beyond(w, t)) {  // the same for all threads, as is all that a barrier depends on
          blacken(t, planes, tile, thread);
          __syncthreads();
        }
        copy_in<In, kChannels>(w, t, by_fours, tile, thread);
        __syncthreads();
        repeat_border(t, planes, tile, thread);
        __syncthreads();
      }
      sample<In, Out, kStaged, kChannels, kPixels>(w, n, shared_map, t, tile, first, past, thread, out);
    }
    __syncthreads();  // before the next image takes the tile and the map
  }
}

// -------------------------------------------------------------------------------------- small uint8 images, a warp each

template <typename Out, bool kWhole>
__global__ void __launch_bounds__(32 * kSmallImages, 6) small_kernel(const __grid_constant__ Warp w, bool by_fours,
                                                                     Out* __restrict__ output) {
  extern __shared__ uint32_t tile[];
  __shared__ SmallImage images[kSmallImages];
  __shared__ SmallNormalization normalization;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSmallImages, n = first + warp;
  if (thread < kSmallImages && first + thread < w.batch) images[thread] = make_small(w, first + thread);
  if (thread >= 32 && thread < 35) make_small_normalization(w, thread - 32, normalization);
  __syncthreads();  // the only one: from here on, each warp for itself
  if (n >= w.batch) return;
  const int64_t pixels = 3 * w.height * w.width;
  Out* out = output + n * pixels;
  const SmallImage& image = images[warp];
  if (image.image < 0) {  // an index out of range, which cannot raise from here without a synchronisation
    for (int i = lane; i < pixels; i += 32) out[i] = converted<Out>(std::is_same_v<Out, uint8_t> ? 0.0f : nanf(""));
    return;
  }
  uint32_t* cells = tile + warp * kCellWords;
  if (image.rows > 0 && image.columns > 0) make_cells<kWhole>(w, image, by_fours, cells, lane);
  __syncwarp();
  make_sides<kWhole>(w, image, static_cast<uint32_t>(w.fill), cells, lane);
  __syncwarp();
  sample_small<Out, kWhole>(w, n, image, normalization, cells, lane, out);
}

// ------------------------------------------------------------------------------------------------------ gradients

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

template <typename In, typename Out>
void forward_images(const Warp& w, void* output, cudaStream_t stream) {
  if (w.batch == 0 || w.channels * w.height * w.width == 0) return;
  STD_TORCH_CHECK(w.height < (1 << 24) && w.width < (1 << 24) && w.channels < (1 << 24),
                  "minter::warp: images of 2^24 channels or more, or as many pixels a side");
  const Plan plan = make_plan<In, Out>(w, output);
  if constexpr (std::is_same_v<In, uint8_t>) {
    const int64_t some = (w.batch + kSmallImages - 1) / kSmallImages;
    if (plan.small && some <= INT32_MAX) {
      const auto kernel = plan.whole ? &small_kernel<Out, true> : &small_kernel<Out, false>;
      kernel<<<static_cast<unsigned>(some), 32 * kSmallImages, kSmallImages * kCellWords * sizeof(uint32_t), stream>>>(
          w, plan.reads_fours, static_cast<Out*>(output));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      return;
    }
  }
  const dim3 blocks(static_cast<unsigned>(std::min(w.batch, kMaxBlocks)),
                    static_cast<unsigned>((w.height + plan.rows - 1) / plan.rows));
  STD_TORCH_CHECK(blocks.y <= 65535, "minter::warp: images of more than 2^19 rows");
  const auto kernel = !plan.staged                           ? &image_kernel<In, Out, false, 0, 1>
                      : w.channels == 3 && plan.writes_fours ? &image_kernel<In, Out, true, 3, 4>
                      : plan.writes_fours                    ? &image_kernel<In, Out, true, 0, 4>
                                                             : &image_kernel<In, Out, true, 0, 1>;
  kernel<<<blocks, kImageThreads, plan.staged ? plan.bytes : 0, stream>>>(
      w, plan.reads_fours, static_cast<int>(plan.rows), static_cast<Out*>(output));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void forward_float64(const Warp& w, void* output, cudaStream_t stream) {
  const int64_t blocks = std::min((w.batch * w.height * w.width + kThreads - 1) / kThreads, kMaxBlocks);
  if (blocks == 0) return;
  float64_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(w, static_cast<double*>(output));
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
  if (in == Type::float64) return forward_float64(w, output, stream);
  if (in == Type::float32 && out == Type::float32) return forward_images<float, float>(w, output, stream);
  if (in == Type::float32) return forward_images<float, BFloat16>(w, output, stream);
  if (out == Type::uint8) return forward_images<uint8_t, uint8_t>(w, output, stream);
  if (out == Type::float32) return forward_images<uint8_t, float>(w, output, stream);
  return forward_images<uint8_t, BFloat16>(w, output, stream);
}

void warp_backward_cuda(const Warp& w, Type in, const void* grad, void* grad_images, double* grad_coefficients,
                        void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (in == Type::float64) return backward<double, double>(w, grad, grad_images, grad_coefficients, stream);
  if (in == Type::float32) return backward<float, float>(w, grad, grad_images, grad_coefficients, stream);
  return backward<float, uint8_t>(w, grad, grad_images, grad_coefficients, stream);
}

}  // namespace minter
