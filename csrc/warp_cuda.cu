// The warp on CUDA: one launch, one block for each image (several for a large one), no synchronisation with the host.
//
// A block copies its source image into shared memory once, in words of four bytes where the layout allows, with its crop
// and flip applied and its border repeated around it, three uint8 channels packed into one word a pixel. Sampling is then
// four shared loads for a pixel and one coalesced store a channel. Images too large for that are read where they lie.
//
// Source points are computed in float32 (CentredMap in warp.h); those that need it once more, in float64.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include <cuda_runtime.h>

#include "warp.h"

namespace minter {
namespace {

using BFloat16 = torch::headeronly::BFloat16;

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

constexpr int kColumns = 32, kRows = kThreads / kColumns;  // a block's threads, over the pixels of an image
constexpr size_t kMaxShared = 48 << 10;                    // what every device grants without being asked

// Where a pixel is read: the upper left tap, counted in the window with its border, and the fractions.
struct Place {
  bool inside;
  int left, top;
  float fx, fy;
};

template <typename Real>
WARP_INLINE Place place(Real column, Real row, int columns, int rows) {
  int left = static_cast<int>(column), top = static_cast<int>(row);
  left = left > columns ? columns : left, top = top > rows ? rows : top;  // had it been rounded up
  return {true, left, top, static_cast<float>(column - left), static_cast<float>(row - top)};
}

WARP_INLINE Place locate(const CentredMap& m, const Warp& w, int64_t n, int row, int column, int columns, int rows) {
  const float x = static_cast<float>(column) + 0.5f - 0.5f * static_cast<int>(w.width);
  const float y = static_cast<float>(row) + 0.5f - 0.5f * static_cast<int>(w.height);
  const float inverse = 1.0f / fmaf(m.g, x, fmaf(m.h, y, m.w));
  const float u = fmaf(m.au, x, fmaf(m.bu, y, m.cu)) * inverse;
  const float v = fmaf(m.av, x, fmaf(m.bv, y, m.cv)) * inverse;
  const float past_u = fabsf(u) - m.half_u, past_v = fabsf(v) - m.half_v;
  const Place outside{false, 1, 1, 0, 0};
  if (!m.exact && fabsf(past_u) > m.doubt_u && fabsf(past_v) > m.doubt_v) {
    return past_u < 0 && past_v < 0 ? place(u + (m.half_u + 0.5f), v + (m.half_v + 0.5f), columns, rows) : outside;
  }
  const View view = load_view(w, n);  // once more, in float64: few pixels come here
  const Point point = source_point(load_coefficients(w, n), row, column);
  if (!inside(view, point)) return outside;
  return place(point.u - view.left + 0.5, point.v - view.top + 0.5, columns, rows);
}

// The layout of an image in shared memory: the view's window, in the direction the source has, a border around it.
struct Tile {
  int rows, columns, pitch, plane;  // pitch: odd, so that a column of pixels lies in different banks
  int origin, down;                 // source column of tile column 0, source row of tile row 0
};

WARP_INLINE Tile make_tile(const Warp& w, const View& view) {
  const int width = static_cast<int>(w.width), pitch = (width + 2) | 1;
  return {static_cast<int>(view.bottom - view.top), static_cast<int>(view.end - view.left), pitch,
          (static_cast<int>(w.height) + 2) * pitch,
          static_cast<int>(view.right + (view.flip ? w.width - view.end : view.left)),
          static_cast<int>(view.top + view.down)};
}

template <typename In>
WARP_INLINE int planes_of(const Warp& w) {
  return static_cast<int>((w.channels + kPacked<In> - 1) / kPacked<In>);
}

WARP_INLINE uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

WARP_INLINE float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// The word of one pixel: up to three uint8 channels, or one float.
template <typename In>
WARP_INLINE uint32_t load_word(const Warp& w, const In* pixel, int plane) {
  if constexpr (std::is_same_v<In, float>) {
    return bits_of(pixel[plane * w.stride_c]);
  } else {
    uint32_t word = 0;
    for (int i = 0; i < 3; ++i) {
      if (plane * 3 + i < w.channels) word |= static_cast<uint32_t>(pixel[(plane * 3 + i) * w.stride_c]) << (8 * i);
    }
    return word;
  }
}

// The steps of a block, each done by all its threads before the next begins.
WARP_INLINE void blacken(const Warp& w, const Tile& t, int planes, uint32_t* tile, int thread) {
  const bool reaches_beyond = t.origin < 0 || t.origin + t.columns > w.width || t.down < 0 || t.down + t.rows > w.height;
  for (int i = thread; reaches_beyond && i < planes * t.plane; i += kThreads) tile[i] = 0;
}

template <typename In>
WARP_INLINE void copy_in(const Warp& w, const View& view, const Tile& t, int planes, bool by_fours, uint32_t* tile,
                         int thread) {
  const In* image = static_cast<const In*>(w.images) + view.image * w.stride_n;
  const int width = static_cast<int>(w.width), height = static_cast<int>(w.height);
  if (by_fours) {  // four neighbouring uint8 pixels of a channel in one load
    const int fours = width / 4;
    for (int i = thread; i < t.rows * fours; i += kThreads) {
      const int row = i / fours, x = 4 * (i - row * fours), y = row + t.down;
      if (y < 0 || y >= height) continue;
      const In* pixels = image + y * w.stride_h + x;
      for (int p = 0; p < planes; ++p) {
        uint32_t channel[3] = {0, 0, 0};
        for (int c = 0; c < 3; ++c) {
          if (p * 3 + c < w.channels) {
            channel[c] = *reinterpret_cast<const uint32_t*>(pixels + (p * 3 + c) * w.stride_c);
          }
        }
        for (int j = 0; j < 4; ++j) {
          const int column = x + j - t.origin;
          if (column < 0 || column >= t.columns) continue;
          tile[p * t.plane + (row + 1) * t.pitch + column + 1] = (channel[0] >> (8 * j) & 255u) |
                                                                 (channel[1] >> (8 * j) & 255u) << 8 |
                                                                 (channel[2] >> (8 * j) & 255u) << 16;
        }
      }
    }
  } else {
    for (int row = thread / kColumns; row < t.rows; row += kRows) {
      const int y = row + t.down;
      for (int column = thread % kColumns; y >= 0 && y < height && column < t.columns; column += kColumns) {
        const int x = column + t.origin;
        if (x < 0 || x >= width) continue;
        const In* pixel = image + y * w.stride_h + x * w.stride_w;
        for (int p = 0; p < planes; ++p) {
          tile[p * t.plane + (row + 1) * t.pitch + column + 1] = load_word(w, pixel, p);
        }
      }
    }
  }
}

WARP_INLINE void repeat_border(const Tile& t, int planes, uint32_t* tile, int thread) {
  const int around = 2 * (t.columns + 2) + 2 * t.rows;
  for (int i = thread; i < around; i += kThreads) {
    int row, column;
    if (i < 2 * (t.columns + 2)) {
      row = i < t.columns + 2 ? 0 : t.rows + 1;
      column = i < t.columns + 2 ? i : i - t.columns - 2;
    } else {
      row = (i - 2 * (t.columns + 2)) / 2 + 1;
      column = i % 2 ? t.columns + 1 : 0;
    }
    const int from_row = row < 1 ? 1 : row > t.rows ? t.rows : row;
    const int from_column = column < 1 ? 1 : column > t.columns ? t.columns : column;
    for (int p = 0; p < planes; ++p) {
      tile[p * t.plane + row * t.pitch + column] = tile[p * t.plane + from_row * t.pitch + from_column];
    }
  }
}

// One channel of a word as a float. uint8: its bits are put into the last places of 2^23, which is then taken away.
template <typename In>
WARP_INLINE float channel_of(uint32_t word, int i) {
  if constexpr (std::is_same_v<In, float>) {
    return float_of(word);
  } else {
#ifdef __CUDA_ARCH__
    return float_of(__byte_perm(word, 0x4b000000u, 0x7440u + i)) - 8388608.0f;
#else
    return static_cast<float>(word >> (8 * i) & 255u);
#endif
  }
}

template <typename Out>
WARP_INLINE void store(Out* output, float value, float scale, float shift) {
  if constexpr (std::is_same_v<Out, uint8_t>) {
    const float low = value > 0.0f ? value : 0.0f;  // NaN: 0
    *output = static_cast<uint8_t>(bits_of((low < 255.0f ? low : 255.0f) + 8388608.0f));
  } else {
    *output = static_cast<Out>(value * scale + shift);
  }
}

WARP_INLINE float scale_of(const Warp& w, int channel) { return w.scale ? w.scale[channel] : 1.0f; }
WARP_INLINE float shift_of(const Warp& w, int channel) { return w.shift ? w.shift[channel] : 0.0f; }

// The pixels of output rows [first_row, past_row) of one image, from the tile or from the image itself. kChannels: their
// number, with what normalises them in registers; 0: any.
template <typename In, typename Out, bool kStaged, int kChannels>
WARP_INLINE void sample(const Warp& w, const View& view, int64_t n, const CentredMap& m, const Tile& t,
                        const uint32_t* tile, int first_row, int past_row, int thread, Out* output) {
  const int width = static_cast<int>(w.width), height = static_cast<int>(w.height);
  const int channels = kChannels > 0 ? kChannels : static_cast<int>(w.channels);
  const int64_t pixels = w.height * w.width;
  float scales[kChannels > 0 ? kChannels : 1], shifts[kChannels > 0 ? kChannels : 1];
  for (int c = 0; c < kChannels; ++c) scales[c] = scale_of(w, c), shifts[c] = shift_of(w, c);
  const float fill = static_cast<float>(w.fill);
  for (int row = first_row + thread / kColumns; row < past_row; row += kRows) {
    for (int column = thread % kColumns; column < width; column += kColumns) {
      const Place p = locate(m, w, n, row, column, t.columns, t.rows);
      const int top = p.top, left = view.flip ? t.columns - p.left : p.left;  // a flipped view's tile is mirrored
      const float fx = view.flip ? 1 - p.fx : p.fx, fy = p.fy;
      int64_t at[4];
      if constexpr (!kStaged) {
        const int rows[2] = {top < 1 ? 0 : top - 1, top >= t.rows ? t.rows - 1 : top};
        const int columns[2] = {left < 1 ? 0 : left - 1, left >= t.columns ? t.columns - 1 : left};
        for (int i = 0; i < 4; ++i) {
          const int y = rows[i / 2] + t.down, x = columns[i % 2] + t.origin;
          const bool black = !p.inside || y < 0 || y >= height || x < 0 || x >= width;
          at[i] = black ? -1 : view.image * w.stride_n + y * w.stride_h + x * w.stride_w;
        }
      }
      Out* out = output + static_cast<int64_t>(row) * width + column;
#pragma unroll
      for (int plane = 0; plane * kPacked<In> < channels; ++plane) {
        uint32_t word[4];
        if constexpr (kStaged) {
          const uint32_t* from = tile + plane * t.plane + top * t.pitch + left;
          word[0] = from[0], word[1] = from[1], word[2] = from[t.pitch], word[3] = from[t.pitch + 1];
        } else {
          for (int i = 0; i < 4; ++i) {
            word[i] = at[i] < 0 ? 0 : load_word(w, static_cast<const In*>(w.images) + at[i], plane);
          }
        }
#pragma unroll
        for (int i = 0; i < kPacked<In>; ++i) {
          const int c = plane * kPacked<In> + i;
          if (c >= channels) break;
          const float p00 = channel_of<In>(word[0], i), p01 = channel_of<In>(word[1], i);
          const float p10 = channel_of<In>(word[2], i), p11 = channel_of<In>(word[3], i);
          const float above = p00 * (1 - fx) + p01 * fx, below = p10 * (1 - fx) + p11 * fx;
          const float value = p.inside ? above * (1 - fy) + below * fy : fill;
          if constexpr (kChannels > 0) {
            store(out + c * pixels, value, scales[c], shifts[c]);
          } else {
            store(out + c * pixels, value, scale_of(w, c), shift_of(w, c));
          }
        }
      }
    }
  }
}

template <typename In, typename Out, bool kStaged, int kChannels>
__global__ void __launch_bounds__(kThreads, 4) image_kernel(const Warp w, bool by_fours, int rows_of_block,
                                                            Out* __restrict__ output) {
  extern __shared__ uint32_t tile[];
  __shared__ CentredMap map;
  const int planes = planes_of<In>(w), thread = threadIdx.x;
  const int height = static_cast<int>(w.height), first = blockIdx.y * rows_of_block;
  const int past = first + rows_of_block < height ? first + rows_of_block : height;
  for (int64_t n = blockIdx.x; n < w.batch; n += gridDim.x) {
    const View view = load_view(w, n);
    const Tile t = make_tile(w, view);
    Out* out = output + n * w.channels * w.height * w.width;
    if (view.image < 0) {  // an index out of range, which cannot raise from here without a synchronisation
      const int64_t begin = static_cast<int64_t>(first) * w.width, end = static_cast<int64_t>(past) * w.width;
      for (int64_t c = 0; c < w.channels; ++c) {
        for (int64_t i = begin + thread; i < end; i += kThreads) {
          store(out + c * w.height * w.width + i, nanf(""), 1.0f, 0.0f);  // uint8: 0
        }
      }
      continue;  // the same for all threads of the block
    }
    if (thread == 0) map = centre(load_coefficients(w, n), view, w.height, w.width);
    if (kStaged && t.rows > 0 && t.columns > 0) {  // otherwise nothing is inside, and the tile is read for nothing
      blacken(w, t, planes, tile, thread);
      __syncthreads();
      copy_in<In>(w, view, t, planes, by_fours, tile, thread);
      __syncthreads();
      repeat_border(t, planes, tile, thread);
    }
    __syncthreads();
    sample<In, Out, kStaged, kChannels>(w, view, n, map, t, tile, first, past, thread, out);
    __syncthreads();  // before the next image takes the tile and the map
  }
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
  const int planes = planes_of<In>(w);
  const size_t bytes = static_cast<size_t>(planes) * (w.height + 2) * ((w.width + 2) | 1) * sizeof(uint32_t);
  const bool staged = bytes <= kMaxShared - sizeof(CentredMap);
  const auto fours = [](int64_t value) { return value % 4 == 0; };
  const bool by_fours = std::is_same_v<In, uint8_t> && w.stride_w == 1 && fours(w.width) && fours(w.stride_h) &&
                        fours(w.stride_c) && fours(w.stride_n) && fours(reinterpret_cast<intptr_t>(w.images));
  // A staged image is one block's; of a larger one each block takes some rows.
  const int64_t rows = staged ? w.height : std::max<int64_t>(kRows, 4096 / w.width / kRows * kRows);
  const dim3 blocks(static_cast<unsigned>(std::min(w.batch, kMaxBlocks)),
                    static_cast<unsigned>((w.height + rows - 1) / rows));
  STD_TORCH_CHECK(blocks.y <= 65535, "minter::warp: images of more than 2^19 rows");
  const auto kernel = !staged           ? &image_kernel<In, Out, false, 0>
                      : w.channels == 3 ? &image_kernel<In, Out, true, 3>
                                        : &image_kernel<In, Out, true, 0>;
  kernel<<<blocks, kThreads, staged ? bytes : 0, stream>>>(w, by_fours, static_cast<int>(rows),
                                                           static_cast<Out*>(output));
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
