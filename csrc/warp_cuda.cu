// The warp on CUDA: one launch, one block for each image (several for a large one), no synchronisation with the host.
//
// A block copies its source image into shared memory once, in words of four bytes where the layout allows, with its
// crop and flip applied and its border repeated around it, three uint8 channels packed into one word a pixel. Sampling
// is then four shared loads for a pixel and one coalesced store a channel, of four pixels where the layout allows.
// Images too large for that, and float64, are read where they lie.
//
// What a block does is written as steps, functions of a thread's number, which compile for the host too (warp_host.h).
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#ifdef __CUDACC__
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <cuda_runtime.h>

#define STEP __device__ __forceinline__
#define STEP_APART __device__ __noinline__
#define UNROLL _Pragma("unroll")
#else
#include "warp_host.h"
#endif

#include "warp.h"

namespace minter {
namespace {

using BFloat16 = torch::headeronly::BFloat16;

constexpr int kThreads = 128;  // few, so that what each does besides its pixels counts for little

#ifdef __CUDACC__
STEP float approximate_inverse(float value) {  // to the last place but one
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(value));
  return inverse;
}
#endif

// ------------------------------------------------------------------------------------------------ an image in a block

// The layout of an image in shared memory: the view's window as it is seen, a border around it. Source column of tile
// column x: origin + step * x; source row of tile row y: down + y.
struct Tile {
  int64_t image;             // -1: the index is out of range
  int rows, columns, pitch;  // pitch: odd, so that pixels below each other lie in different banks
  int plane;                 // words of one plane
  int origin, step, down;
};

STEP Tile make_tile(const Warp& w, int64_t n) {
  const View view = load_view(w, n);
  const int pitch = (static_cast<int>(w.width) + 2) | 1, columns = static_cast<int>(view.end - view.left);
  const int first = static_cast<int>(source_column(w, view));
  return {view.image, static_cast<int>(view.bottom - view.top), columns, pitch,
          static_cast<int>((w.height + 2) * pitch), view.flip ? first + columns - 1 : first, view.flip ? -1 : 1,
          static_cast<int>(view.top + view.down)};
}

// kChannels: how many where that is known to the compiler, else 0.
template <int kChannels>
STEP int channels_of(const Warp& w) {
  return kChannels > 0 ? kChannels : static_cast<int>(w.channels);
}

template <typename In, int kChannels>
STEP int planes_of(const Warp& w) {
  return (channels_of<kChannels>(w) + kPacked<In> - 1) / kPacked<In>;
}

// The steps of a block, each done by all its threads before the next begins.

STEP bool reaches_beyond(const Warp& w, const Tile& t) {
  const int last = t.origin + t.step * (t.columns - 1), width = static_cast<int>(w.width);
  return t.origin < 0 || t.origin >= width || last < 0 || last >= width || t.down < 0 || t.down + t.rows > w.height;
}

STEP void blacken(const Tile& t, int planes, uint32_t* tile, int thread) {
  for (int i = thread; i < planes * t.plane; i += kThreads) tile[i] = 0;
}

// The word of one pixel: up to three uint8 channels, or one float.
template <typename In, int kChannels>
STEP uint32_t load_word(const Warp& w, const In* pixel, int plane) {
  if constexpr (std::is_same_v<In, float>) {
    return __float_as_uint(pixel[plane * w.stride_c]);
  } else {
    uint32_t word = 0;
    for (int i = 0; i < 3; ++i) {
      const int c = plane * 3 + i;
      if (c < channels_of<kChannels>(w)) word |= static_cast<uint32_t>(pixel[c * w.stride_c]) << (8 * i);
    }
    return word;
  }
}

// Four neighbouring uint8 pixels of a channel in one load.
template <int kChannels>
STEP void copy_fours(const Warp& w, const Tile& t, const uint8_t* image, uint32_t* tile, int thread) {
  const int channels = channels_of<kChannels>(w), planes = planes_of<uint8_t, kChannels>(w);
  for (int row = thread / 8; row < t.rows; row += kThreads / 8) {
    const int y = row + t.down;
    if (y < 0 || y >= w.height) continue;
    for (int x = 4 * (thread % 8); x < w.width; x += 32) {
      const uint8_t* pixels = image + y * w.stride_h + x;
      const int start = t.step * (x - t.origin);
      UNROLL for (int p = 0; p < planes; ++p) {
        uint32_t channel[3] = {0, 0, 0};
        UNROLL for (int c = 0; c < 3; ++c) {
          if (p * 3 + c < channels) channel[c] = *reinterpret_cast<const uint32_t*>(pixels + (p * 3 + c) * w.stride_c);
        }
        const uint32_t lower = __byte_perm(channel[0], channel[1], 0x5140);
        const uint32_t upper = __byte_perm(channel[0], channel[1], 0x7362);
        const uint32_t words[4] = {__byte_perm(lower, channel[2], 0x4410), __byte_perm(lower, channel[2], 0x5532),
                                   __byte_perm(upper, channel[2], 0x6610), __byte_perm(upper, channel[2], 0x7732)};
        uint32_t* to = tile + p * t.plane + (row + 1) * t.pitch + 1;
        UNROLL for (int j = 0; j < 4; ++j) {
          const unsigned column = start + t.step * j;  // left of the window: a large number
          if (column < static_cast<unsigned>(t.columns)) to[column] = words[j];
        }
      }
    }
  }
}

template <typename In, int kChannels>
STEP void copy_in(const Warp& w, const Tile& t, bool by_fours, uint32_t* tile, int thread) {
  const In* image = static_cast<const In*>(w.images) + t.image * w.stride_n;
  if constexpr (std::is_same_v<In, uint8_t>) {
    if (by_fours) return copy_fours<kChannels>(w, t, image, tile, thread);
  }
  for (int row = thread / 32; row < t.rows; row += kThreads / 32) {
    const int y = row + t.down;
    for (int column = thread % 32; y >= 0 && y < w.height && column < t.columns; column += 32) {
      const int x = t.origin + t.step * column;
      if (x < 0 || x >= w.width) continue;
      const In* pixel = image + y * w.stride_h + x * w.stride_w;
      for (int p = 0; p < planes_of<In, kChannels>(w); ++p) {
        tile[p * t.plane + (row + 1) * t.pitch + column + 1] = load_word<In, kChannels>(w, pixel, p);
      }
    }
  }
}

// One half of the threads does the rows above and below, corners included, the other the columns beside.
STEP void repeat_border(const Tile& t, int planes, uint32_t* tile, int thread) {
  constexpr int kHalf = kThreads / 2;
  const int last = t.rows * t.pitch;
  for (int p = 0; p < planes; ++p, tile += t.plane) {
    for (int x = thread; thread < kHalf && x < t.columns + 2; x += kHalf) {
      const int from = x < 1 ? 1 : x > t.columns ? t.columns : x;
      tile[x] = tile[t.pitch + from];
      tile[last + t.pitch + x] = tile[last + from];
    }
    for (int y = thread - kHalf + 1; thread >= kHalf && y <= t.rows; y += kHalf) {
      uint32_t* row = tile + y * t.pitch;
      row[0] = row[1];
      row[t.columns + 1] = row[t.columns];
    }
  }
}

// ----------------------------------------------------------------------------------------------- where a pixel is read

// The upper left tap, counted in the window with its border, and the fractions. kUnit: of what is interpolated there;
// kFrom: what that is counted from.
struct Place {
  static constexpr float kUnit = 1, kFrom = 0;
  bool inside;
  int left, top;
  float fx, fy;
};

// The same of uint8 images in shared memory: some 70 instructions for a pixel of three channels (SASS for sm_90). The
// column is in fixed point, with 15 bits behind the point, so that one instruction adds two products of a weight and a
// byte: 0.004 grey levels off at most.
struct FixedPlace {
  static constexpr float kUnit = 1.0f / 32768, kFrom = 8388608;
  bool inside;
  int at;            // of the upper left word in the tile; 0 outside
  uint32_t weights;  // 16 bits of the left word, 16 of the right
  float fy;
};

// Wider images have points that are less exact in themselves. (It could be 255 at most: (columns + 1/2) 2^15 < 2^23.)
constexpr int kMostFixedColumns = 128;
constexpr float kFar = 1e30f;

// A point in float32, counted from the window's centre.
struct CentredPoint { float u, v; bool inside; };

// Whether float32 cannot tell of the closest point on which side of the border it lies.
STEP bool doubtful(const CentredMap& m, float closest) { return !(closest > fmaxf(m.doubt_u, m.doubt_v)); }

// `closest` becomes the distance to the window's border, if that is less. x, y: from the centre of the output.
STEP CentredPoint centred_point(const CentredMap& m, float x, float y, float& closest) {
  const float inverse = approximate_inverse(fmaf(m.g, x, fmaf(m.h, y, m.w)));
  const float u = fmaf(m.au, x, fmaf(m.bu, y, m.cu)) * inverse, v = fmaf(m.av, x, fmaf(m.bv, y, m.cv)) * inverse;
  const float past = fmaxf(fabsf(u) - m.half_u, fabsf(v) - m.half_v);
  closest = fminf(closest, fabsf(past));
  return {u, v, past < 0};
}

// 2^23 and the whole part of a float in [0, 2^22), whose last bits are that number.
STEP float floor_among(float value) { return __fadd_rd(value, 8388608.0f); }

// A point outside gets a place that is as good as any.
STEP void locate(const CentredMap& m, const Tile&, float x, float y, float& closest, Place& place) {
  const CentredPoint point = centred_point(m, x, y, closest);
  const float column = point.inside ? point.u + (m.half_u + 0.5f) : 1.0f;
  const float row = point.inside ? point.v + (m.half_v + 0.5f) : 1.0f;
  const float left = floor_among(column), top = floor_among(row);
  place = {point.inside, static_cast<int>(__float_as_uint(left) & 0x7fffffu),
           static_cast<int>(__float_as_uint(top) & 0x7fffffu), column - (left - 8388608.0f), row - (top - 8388608.0f)};
}

STEP void locate(const CentredMap& m, const Tile& t, float x, float y, float& closest, FixedPlace& place) {
  const CentredPoint point = centred_point(m, x, y, closest);
  const uint32_t column = __float_as_uint(fmaf(point.u, 32768.0f, (m.half_u + 0.5f) * 32768.0f + 8388608.0f));
  const float row = point.v + (m.half_v + 0.5f), top = floor_among(row);
  const uint32_t wide = static_cast<uint32_t>(t.pitch);  // less what the bits of 2^23 add to row and column
  const uint32_t at = __float_as_uint(top) * wide + (column >> 15) - (0x4b000000u * wide + 0x9600u);
  place = {point.inside, point.inside ? static_cast<int>(at) : 0, (column & 32767u) * 65535u + 32768u,
           row - (top - 8388608.0f)};
}

STEP Place locate_exactly(const Coefficients& k, const View& view, int row, int column) {
  const Point point = source_point(k, row, column);
  if (!inside(view, point)) return {false, 1, 1, 0, 0};
  const double u = point.u - view.left + 0.5, v = point.v - view.top + 0.5;
  const int left = static_cast<int>(u), top = static_cast<int>(v);
  return {true, left, top, static_cast<float>(u - left), static_cast<float>(v - top)};
}

// -------------------------------------------------------------------------------------------------- what is read there

STEP int word_of(const Tile& t, const Place& p) { return p.top * t.pitch + p.left; }
STEP int word_of(const Tile&, const FixedPlace& p) { return p.at; }

// Channel i of the four words around a place.
template <typename In>
STEP float interpolate(const uint32_t (&words)[4], int i, const Place& p) {
  float t[4];
  for (int k = 0; k < 4; ++k) {
    t[k] = std::is_same_v<In, float> ? __uint_as_float(words[k]) : static_cast<float>(words[k] >> 8 * i & 255u);
  }
  const float fx = p.fx, fy = p.fy, gx = 1 - fx, gy = 1 - fy;
  return fmaf(fmaf(t[0], gx, t[1] * fx), gy, fmaf(t[2], gx, t[3] * fx) * fy);
}

// 2^23 and the weighted sum of byte i of two words.
STEP float weighted_among(uint32_t left, uint32_t right, int i, uint32_t weights) {
  const uint32_t bytes = __byte_perm(left, right, static_cast<uint32_t>((4 + i) << 4 | i));
  return __uint_as_float(__dp2a_lo(weights, bytes, 0x4b000000u));
}

template <typename In>
STEP float interpolate(const uint32_t (&words)[4], int i, const FixedPlace& p) {
  const float above = weighted_among(words[0], words[1], i, p.weights);
  const float below = weighted_among(words[2], words[3], i, p.weights);
  return fmaf(p.fy, below - above, above);
}

// To the type of the output. uint8: a value in [0, 255], which the addition rounds to the nearest, ties to even.
template <typename Out>
STEP Out converted(float value) {
  if constexpr (std::is_same_v<Out, uint8_t>) {
    return static_cast<uint8_t>(__float_as_uint(value + 8388608.0f));
  } else {
    return static_cast<Out>(value);
  }
}

// What an index out of range, which cannot raise from here without a synchronisation, makes of an image.
template <typename Out>
STEP Out no_image() {
  return std::is_same_v<Out, uint8_t> ? static_cast<Out>(0.0f) : static_cast<Out>(nanf(""));
}

// Neighbouring pixels of one channel, in one store.
template <typename Out, int kPixels>
STEP void store(Out* out, const float (&values)[kPixels]) {
  struct alignas(kPixels * sizeof(Out)) Pixels { Out of[kPixels]; } pixels;
  UNROLL for (int j = 0; j < kPixels; ++j) pixels.of[j] = converted<Out>(values[j]);
  *reinterpret_cast<Pixels*>(out) = pixels;
}

// What an interpolated value becomes, inside: value * scale + shift; and what is written outside.
struct Normalization { float scale, shift, fill; };

template <typename Out, typename AnyPlace>
STEP Normalization normalization_of(const Warp& w, int channel) {
  const float scale = w.scale ? w.scale[channel] : 1.0f, shift = w.shift ? w.shift[channel] : 0.0f;
  const float from = AnyPlace::kFrom > 0 ? fmaf(-AnyPlace::kFrom * AnyPlace::kUnit, scale, shift) : shift;
  return {scale * AnyPlace::kUnit, from, fmaf(fill_value<Out>(w), scale, shift)};
}

// kPixels pixels beside each other, whose places are known, to `out`. kChannels: their number, with what normalises
// them in registers; 0: any.
template <typename In, typename Out, int kChannels, int kPixels, typename AnyPlace>
STEP void write_pixels(const Warp& w, const Tile& t, const uint32_t* tile, const AnyPlace (&places)[kPixels],
                       const Normalization* known, Out* out) {
  const int channels = channels_of<kChannels>(w), pixels = static_cast<int>(w.height) * static_cast<int>(w.width);
  UNROLL for (int plane = 0; plane * kPacked<In> < channels; ++plane) {
    float made[kPacked<In>][kPixels];
    UNROLL for (int j = 0; j < kPixels; ++j) {
      const uint32_t* from = tile + plane * t.plane + word_of(t, places[j]);
      const uint32_t words[4] = {from[0], from[1], from[t.pitch], from[t.pitch + 1]};
      UNROLL for (int i = 0; i < kPacked<In>; ++i) {
        const int c = plane * kPacked<In> + i;
        if (c >= channels) break;
        const Normalization k = kChannels > 0 ? known[c] : normalization_of<Out, AnyPlace>(w, c);
        const float value = fmaf(interpolate<In>(words, i, places[j]), k.scale, k.shift);
        const uint32_t inside = places[j].inside ? ~0u : 0u;  // selection by bits: a condition would become a branch
        made[i][j] = __uint_as_float((__float_as_uint(value) & inside) | (__float_as_uint(k.fill) & ~inside));
      }
    }
    UNROLL for (int i = 0; i < kPacked<In>; ++i) {
      const int c = plane * kPacked<In> + i;
      if (c < channels) store<Out, kPixels>(out + c * pixels, made[i]);
    }
  }
}

// Those of a thread's pixels that float32 cannot place, or all, in float64. Few come here, and the common way stays
// short.
template <typename In, typename Out, int kPixels>
STEP_APART void sample_exactly(const Warp& w, int64_t n, const CentredMap& m, const Tile& t, const uint32_t* tile,
                               int thread, bool all, Out* output) {
  constexpr int kAcross = 32 / kPixels;
  const int width = static_cast<int>(w.width), height = static_cast<int>(w.height);
  const float x0 = 0.5f - 0.5f * width, y0 = 0.5f - 0.5f * height;
  const Coefficients k = load_coefficients(w, n);
  const View view = load_view(w, n);
  for (int row = thread / kAcross; row < height; row += kThreads / kAcross) {
    for (int start = kPixels * (thread % kAcross); start < width; start += 32) {
      for (int column = start; column < start + kPixels; ++column) {
        float closest = kFar;
        centred_point(m, x0 + static_cast<float>(column), y0 + static_cast<float>(row), closest);
        if (!all && !doubtful(m, closest)) continue;
        const Place places[1] = {locate_exactly(k, view, row, column)};
        write_pixels<In, Out, 0, 1>(w, t, tile, places, nullptr, output + row * width + column);
      }
    }
  }
}

// The pixels of one image. Those that float32 cannot place are done once more.
template <typename In, typename Out, int kChannels, int kPixels>
STEP void sample(const Warp& w, int64_t n, const CentredMap& shared_map, const Tile& t, const uint32_t* tile,
                 int thread, Out* output) {
  constexpr int kAcross = 32 / kPixels;  // threads beside each other, which do 32 pixels
  constexpr bool kFixed = std::is_same_v<In, uint8_t> && kPixels == 4;
  using AnyPlace = std::conditional_t<kFixed, FixedPlace, Place>;
  const CentredMap m = shared_map;  // in registers
  const int width = static_cast<int>(w.width), height = static_cast<int>(w.height);
  const float x0 = 0.5f - 0.5f * width, y0 = 0.5f - 0.5f * height;
  Normalization known[kChannels > 0 ? kChannels : 1];
  bool all = m.exact;
  for (int c = 0; c < channels_of<kChannels>(w); ++c) {
    const Normalization k = normalization_of<Out, AnyPlace>(w, c);
    if (kChannels > 0) known[c] = k;
    all = all || (kFixed && !(fabsf(k.shift) < kFar));  // 2^23 times the scale is too much for a float
  }
  float closest = kFar;
  for (int row = thread / kAcross; row < height && !all; row += kThreads / kAcross) {
    for (int column = kPixels * (thread % kAcross); column < width; column += 32) {
      const float first = x0 + static_cast<float>(column), y = y0 + static_cast<float>(row);
      AnyPlace places[kPixels];
      UNROLL for (int j = 0; j < kPixels; ++j) locate(m, t, first + j, y, closest, places[j]);
      write_pixels<In, Out, kChannels, kPixels>(w, t, tile, places, known, output + row * width + column);
    }
  }
  if (!all && !doubtful(m, closest)) return;
  sample_exactly<In, Out, kPixels>(w, n, shared_map, t, tile, thread, all, output);
}

// ------------------------------------------------------------------------------------ images read where they lie

// Pixel i of an image: in float64 where float32 cannot place it, and of float64 images.
template <typename Real, typename In, typename Out>
STEP void sample_directly(const Warp& w, int64_t n, const CentredMap& m, const View& view, int64_t i, Out* output) {
  const int64_t pixels = w.height * w.width, row = i / w.width, column = i % w.width;
  float closest = kFar;
  CentredPoint near{};
  if (!std::is_same_v<Real, double> && !m.exact) {
    const float x0 = 0.5f - 0.5f * static_cast<float>(w.width), y0 = 0.5f - 0.5f * static_cast<float>(w.height);
    near = centred_point(m, x0 + static_cast<float>(column), y0 + static_cast<float>(row), closest);
  }
  Point point{};
  bool within = near.inside;
  if (std::is_same_v<Real, double> || m.exact || doubtful(m, closest)) {
    point = source_point(load_coefficients(w, n), row, column);
    within = inside(view, point);
  } else {
    point.u = view.left + (static_cast<double>(near.u) + m.half_u);
    point.v = view.top + (static_cast<double>(near.v) + m.half_v);
  }
  const Taps<Real> t = within ? taps<Real>(w, view, point) : Taps<Real>{};
  const Real outside = std::is_same_v<Real, double> ? static_cast<Real>(w.fill) : fill_value<Out>(w);
  for (int64_t c = 0; c < w.channels; ++c) {
    const Real value = normalized(w, within ? bilinear<Real, In>(w, t, c) : outside, c);
    if constexpr (std::is_same_v<Real, double>) {
      output[c * pixels + i] = value;
    } else {
      output[c * pixels + i] = converted<Out>(value);
    }
  }
}

// How the images of a call are worked on.
struct Plan {
  size_t bytes;       // of a block's copy of an image
  bool staged;        // whether that fits into shared memory
  bool reads_fours;   // whether four uint8 pixels can be loaded at once
  bool writes_fours;  // whether four pixels of a channel can be stored at once
};

template <typename In, typename Out>
Plan make_plan(const Warp& w, const void* output) {
  constexpr size_t most = (48 << 10) - sizeof(CentredMap) - sizeof(Tile);  // every device grants 48 KiB unasked
  const auto fours = [](int64_t value) { return value % 4 == 0; };
  Plan plan;
  const int64_t planes = (w.channels + kPacked<In> - 1) / kPacked<In>;
  plan.bytes = sizeof(uint32_t) * planes * (w.height + 2) * ((w.width + 2) | 1);
  plan.staged = !std::is_same_v<In, double> && plan.bytes <= most;
  plan.reads_fours = std::is_same_v<In, uint8_t> && w.stride_w == 1 && fours(w.width) && fours(w.stride_h) &&
                     fours(w.stride_c) && fours(w.stride_n) && fours(reinterpret_cast<intptr_t>(w.images));
  plan.writes_fours = fours(w.width) && reinterpret_cast<uintptr_t>(output) % (4 * sizeof(Out)) == 0 &&
                      (std::is_same_v<In, float> || w.width <= kMostFixedColumns);
  return plan;
}

#ifdef __CUDACC__
// ------------------------------------------------------------------------------------------------------------ kernels

// kPixels: 4 where rows and the output's address are multiples of that, else 1.
template <typename In, typename Out, int kChannels, int kPixels>
__global__ void __launch_bounds__(kThreads, 8)
    staged_kernel(const __grid_constant__ Warp w, bool by_fours, Out* __restrict__ output) {
  extern __shared__ uint32_t tile[];
  __shared__ CentredMap shared_map;
  __shared__ Tile shared_tile;
  const int planes = planes_of<In, kChannels>(w), thread = threadIdx.x;
  const int64_t elements = w.channels * w.height * w.width;
  for (int64_t n = blockIdx.x; n < w.batch; n += gridDim.x) {
    // What all threads need is made by one of them, and what takes longest by one of another warp meanwhile.
    if (thread == 0) shared_tile = make_tile(w, n);
    if (thread == 32) shared_map = centre(load_coefficients(w, n), load_view(w, n), w.height, w.width);
    __syncthreads();
    const Tile t = shared_tile;  // in registers, as the map in `sample`
    Out* out = output + n * elements;
    if (t.image < 0) {
      for (int64_t i = thread; i < elements; i += kThreads) out[i] = no_image<Out>();
    } else {
      if (t.rows > 0 && t.columns > 0) {  // otherwise nothing is inside, and the tile is read for nothing
        if (reaches_beyond(w, t)) {       // the same for all threads, as is all that a barrier depends on
          blacken(t, planes, tile, thread);
          __syncthreads();
        }
        copy_in<In, kChannels>(w, t, by_fours, tile, thread);
        __syncthreads();
        repeat_border(t, planes, tile, thread);
        __syncthreads();
      }
      sample<In, Out, kChannels, kPixels>(w, n, shared_map, t, tile, thread, out);
    }
    __syncthreads();  // before the next image takes the tile and the map
  }
}

// A block has some of an image's pixels.
template <typename Real, typename In, typename Out>
__global__ void __launch_bounds__(kThreads)
    direct_kernel(const __grid_constant__ Warp w, int64_t each, Out* __restrict__ output) {
  __shared__ CentredMap map;
  const int64_t pixels = w.height * w.width, first = blockIdx.y * each;
  const int64_t past = first + each < pixels ? first + each : pixels;
  for (int64_t n = blockIdx.x; n < w.batch; n += gridDim.x) {
    const View view = load_view(w, n);
    if (threadIdx.x == 0) map = centre(load_coefficients(w, n), view, w.height, w.width);
    __syncthreads();
    Out* out = output + n * w.channels * pixels;
    for (int64_t i = first + threadIdx.x; i < past; i += kThreads) {
      if (view.image >= 0) {
        sample_directly<Real, In, Out>(w, n, map, view, i, out);
      } else {
        for (int64_t c = 0; c < w.channels; ++c) out[c * pixels + i] = no_image<Out>();
      }
    }
    __syncthreads();  // before the next image takes the map
  }
}

// One block for each image, so that the sums over its pixels need no atomics and come out the same every time. The
// gradient of the images scatters with atomics: its last bits depend on the order.
constexpr int kGradientThreads = 256;

template <typename Real, typename In>
__global__ void __launch_bounds__(kGradientThreads) backward_kernel(const Warp w, const Real* __restrict__ grad_output,
                                                                    Real* grad_images, double* grad_coefficients) {
  __shared__ double shared[8][kGradientThreads / 32];
  const int64_t pixels = w.height * w.width;
  for (int64_t n = blockIdx.x; n < w.batch; n += gridDim.x) {
    const Coefficients coefficients = load_coefficients(w, n);
    const View view = load_view(w, n);
    const Real* grad = grad_output + n * w.channels * pixels;
    double sums[8] = {};
    for (int64_t i = threadIdx.x; i < pixels && view.image >= 0; i += kGradientThreads) {
      add_gradients<Real, In>(w, view, coefficients, grad, i, grad_images, grad_coefficients != nullptr, sums);
    }
    if (grad_coefficients) {
      for (int k = 0; k < 8; ++k) {
        for (int lanes = 16; lanes > 0; lanes /= 2) sums[k] += __shfl_down_sync(0xffffffffu, sums[k], lanes);
        if (threadIdx.x % 32 == 0) shared[k][threadIdx.x / 32] = sums[k];
      }
      __syncthreads();
      if (threadIdx.x < 8) {
        double sum = 0;
        for (int warp = 0; warp < kGradientThreads / 32; ++warp) sum += shared[threadIdx.x][warp];
        grad_coefficients[n * 8 + threadIdx.x] = sum;
      }
      __syncthreads();
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- launches

constexpr int64_t kMaxBlocks = 1 << 20;  // beyond this each block takes several images

template <typename In, typename Out>
void forward(const Warp& w, void* to, cudaStream_t stream) {
  if (w.batch == 0 || w.channels * w.height * w.width == 0) return;
  STD_TORCH_CHECK(w.height < (1 << 24) && w.width < (1 << 24) && w.channels < (1 << 24),
                  "minter::warp: images of 2^24 channels or more, or as many pixels a side");
  const Plan plan = make_plan<In, Out>(w, to);
  Out* output = static_cast<Out*>(to);
  const unsigned blocks = static_cast<unsigned>(std::min(w.batch, kMaxBlocks));
  if constexpr (!std::is_same_v<In, double>) {
    if (plan.staged) {
      const auto kernel = !plan.writes_fours ? &staged_kernel<In, Out, 0, 1>
                          : w.channels == 3  ? &staged_kernel<In, Out, 3, 4>
                                             : &staged_kernel<In, Out, 0, 4>;
      kernel<<<blocks, kThreads, plan.bytes, stream>>>(w, plan.reads_fours, output);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      return;
    }
  }
  using Real = std::conditional_t<std::is_same_v<In, double>, double, float>;
  const int64_t pixels = w.height * w.width, each = std::max<int64_t>(4096, (pixels + 65534) / 65535);
  const dim3 parts(blocks, static_cast<unsigned>((pixels + each - 1) / each));
  direct_kernel<Real, In, Out><<<parts, kThreads, 0, stream>>>(w, each, output);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename Real, typename In>
void backward(const Warp& w, const void* grad, void* grad_images, double* grad_coefficients, cudaStream_t stream) {
  const int64_t blocks = std::min(w.batch, kMaxBlocks);
  if (blocks == 0) return;
  backward_kernel<Real, In><<<static_cast<unsigned>(blocks), kGradientThreads, 0, stream>>>(
      w, static_cast<const Real*>(grad), static_cast<Real*>(grad_images), grad_coefficients);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}
#endif

}  // namespace

#ifdef __CUDACC__
void warp_cuda(const Warp& w, Type in, Type out, void* output, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (in == Type::float64) return forward<double, double>(w, output, stream);
  if (in == Type::float32 && out == Type::float32) return forward<float, float>(w, output, stream);
  if (in == Type::float32) return forward<float, BFloat16>(w, output, stream);
  if (out == Type::uint8) return forward<uint8_t, uint8_t>(w, output, stream);
  if (out == Type::float32) return forward<uint8_t, float>(w, output, stream);
  return forward<uint8_t, BFloat16>(w, output, stream);
}

void warp_backward_cuda(const Warp& w, Type in, const void* grad, void* grad_images, double* grad_coefficients,
                        void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (in == Type::float64) return backward<double, double>(w, grad, grad_images, grad_coefficients, stream);
  if (in == Type::float32) return backward<float, float>(w, grad, grad_images, grad_coefficients, stream);
  return backward<float, uint8_t>(w, grad, grad_images, grad_coefficients, stream);
}
#endif

}  // namespace minter
