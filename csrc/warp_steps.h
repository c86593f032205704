// The steps of the CUDA kernel for uint8 and float32 images, as functions of a thread's number. They compile for the host
// too, where they can be run for one thread after the other and compared with the reference (tests/warp_steps.cpp).
//
// A block copies its source image into shared memory once, in words of four bytes where the layout allows, with its crop
// and flip applied and its border repeated around it, three uint8 channels packed into one word a pixel. Sampling is then
// four shared loads for a pixel and one coalesced store a channel, of four pixels where the layout allows. Images too
// large for that are read where they lie.
//
// Small uint8 images of three channels (32 x 32 at most) have a warp each, and another layout in shared memory: see below.
//
// Source points are computed in float32 (CentredMap in warp.h); those that need it once more, in float64.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#define WARP_APART __host__ __device__ __noinline__
#else
#define WARP_APART inline
#endif

#ifdef __CUDA_ARCH__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

#include "warp.h"

namespace minter {

using BFloat16 = torch::headeronly::BFloat16;

constexpr int kImageThreads = 128;  // few, so that what each does besides its pixels counts for little

// The layout of an image in shared memory: the view's window as it is seen, a border around it. Source column of tile
// column x: origin + step * x; source row of tile row y: down + y.
struct Tile {
  int64_t image;             // -1: the index is out of range
  int rows, columns, pitch;  // pitch: odd, so that pixels below each other lie in different banks
  int plane;                 // words of one plane, where the image fits into shared memory
  int origin, step, down;
};

WARP_INLINE Tile make_tile(const Warp& w, int64_t n) {
  const View view = load_view(w, n);
  const int pitch = (static_cast<int>(w.width) + 2) | 1, width = static_cast<int>(w.width);
  const int left = static_cast<int>(view.left), right = static_cast<int>(view.right);
  return {view.image, static_cast<int>(view.bottom - view.top), static_cast<int>(view.end - view.left), pitch,
          static_cast<int>((w.height + 2) * pitch), view.flip ? right + width - 1 - left : right + left,
          view.flip ? -1 : 1, static_cast<int>(view.top + view.down)};
}

// kChannels: how many where that is known to the compiler, else 0.
template <int kChannels>
WARP_INLINE int channels_of(const Warp& w) {
  return kChannels > 0 ? kChannels : static_cast<int>(w.channels);
}

template <typename In, int kChannels>
WARP_INLINE int planes_of(const Warp& w) {
  return (channels_of<kChannels>(w) + kPacked<In> - 1) / kPacked<In>;
}

WARP_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

WARP_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// A few instructions with their meaning, for the host too, on which the steps of a block can be run one by one.

// Four bytes of the eight of `low` and `high`, chosen by the hexadecimal digits of `which`.
WARP_INLINE uint32_t bytes_of(uint32_t low, uint32_t high, uint32_t which) {
#ifdef __CUDA_ARCH__
  return __byte_perm(low, high, which);
#else
  const uint64_t all = static_cast<uint64_t>(high) << 32 | low;
  uint32_t chosen = 0;
  for (int i = 0; i < 4; ++i) chosen |= static_cast<uint32_t>(all >> (which >> 4 * i & 7) * 8 & 255) << 8 * i;
  return chosen;
#endif
}

// 2^23 and the whole part of a float in [0, 2^22), whose last bits are that number.
WARP_INLINE float floor_among(float value) {
#ifdef __CUDA_ARCH__
  return __fadd_rd(value, 8388608.0f);
#else
  return floorf(value) + 8388608.0f;
#endif
}

WARP_INLINE float inverse_of(float value) {  // to the last place but one
#ifdef __CUDA_ARCH__
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(value));
  return inverse;
#else
  return 1.0f / value;
#endif
}

// Without a branch, which a conditional expression would become.
WARP_INLINE float selected(bool condition, float value, float other) {
  const uint32_t bits = condition ? ~0u : 0u;
  return float_of((bits_of(value) & bits) | (bits_of(other) & ~bits));
}

// The word of one pixel: up to three uint8 channels, or one float.
template <typename In, int kChannels>
WARP_INLINE uint32_t load_word(const Warp& w, const In* pixel, int plane) {
  if constexpr (std::is_same_v<In, float>) {
    return bits_of(pixel[plane * w.stride_c]);
  } else {
    uint32_t word = 0;
    for (int i = 0; i < 3; ++i) {
      const int c = plane * 3 + i;
      if (c < channels_of<kChannels>(w)) word |= static_cast<uint32_t>(pixel[c * w.stride_c]) << (8 * i);
    }
    return word;
  }
}

// The steps of a block, each done by all its threads before the next begins.

WARP_INLINE bool reaches_beyond(const Warp& w, const Tile& t) {
  const int last = t.origin + t.step * (t.columns - 1), width = static_cast<int>(w.width);
  return t.origin < 0 || t.origin >= width || last < 0 || last >= width || t.down < 0 || t.down + t.rows > w.height;
}

WARP_INLINE void blacken(const Tile& t, int planes, uint32_t* tile, int thread) {
  for (int i = thread; i < planes * t.plane; i += kImageThreads) tile[i] = 0;
}

template <typename In, int kChannels>
WARP_INLINE void copy_in(const Warp& w, const Tile& t, bool by_fours, uint32_t* tile, int thread) {
  const int channels = channels_of<kChannels>(w), planes = planes_of<In, kChannels>(w);
  const In* image = static_cast<const In*>(w.images) + t.image * w.stride_n;
  const int width = static_cast<int>(w.width), height = static_cast<int>(w.height);
  if (by_fours) {  // four neighbouring uint8 pixels of a channel in one load
    const int first = 4 * (thread % 8);
    for (int row = thread / 8; row < t.rows; row += kImageThreads / 8) {
      const int y = row + t.down;
      if (y < 0 || y >= height) continue;
      const In* pixels = image + y * w.stride_h;
      for (int x = first; x < width; x += 32) {
        const int start = t.step * (x - t.origin);
        UNROLL for (int p = 0; p < planes; ++p) {
          uint32_t channel[3] = {0, 0, 0};
          UNROLL for (int c = 0; c < 3; ++c) {
            if (p * 3 + c < channels) {
              channel[c] = *reinterpret_cast<const uint32_t*>(pixels + (p * 3 + c) * w.stride_c + x);
            }
          }
          const uint32_t lower = bytes_of(channel[0], channel[1], 0x5140);
          const uint32_t upper = bytes_of(channel[0], channel[1], 0x7362);
          const uint32_t words[4] = {bytes_of(lower, channel[2], 0x4410), bytes_of(lower, channel[2], 0x5532),
                                     bytes_of(upper, channel[2], 0x6610), bytes_of(upper, channel[2], 0x7732)};
          uint32_t* to = tile + p * t.plane + (row + 1) * t.pitch + 1;
          UNROLL for (int j = 0; j < 4; ++j) {
            const unsigned column = start + t.step * j;  // left of the window: a large number
            if (column < static_cast<unsigned>(t.columns)) to[column] = words[j];
          }
        }
      }
    }
  } else {
    for (int row = thread / 32; row < t.rows; row += kImageThreads / 32) {
      const int y = row + t.down;
      for (int column = thread % 32; y >= 0 && y < height && column < t.columns; column += 32) {
        const int x = t.origin + t.step * column;
        if (x < 0 || x >= width) continue;
        const In* pixel = image + y * w.stride_h + x * w.stride_w;
        for (int p = 0; p < planes; ++p) {
          tile[p * t.plane + (row + 1) * t.pitch + column + 1] = load_word<In, kChannels>(w, pixel, p);
        }
      }
    }
  }
}

// One half of the threads does the rows above and below, corners included, the other the columns beside.
WARP_INLINE void repeat_border(const Tile& t, int planes, uint32_t* tile, int thread) {
  constexpr int kHalf = kImageThreads / 2;
  const int last = t.rows * t.pitch;
  for (int p = 0; p < planes; ++p, tile += t.plane) {
    if (thread < kHalf) {
      for (int x = thread; x < t.columns + 2; x += kHalf) {
        const int from = x < 1 ? 1 : x > t.columns ? t.columns : x;
        tile[x] = tile[t.pitch + from];
        tile[last + t.pitch + x] = tile[last + from];
      }
    } else {
      for (int y = thread - kHalf + 1; y <= t.rows; y += kHalf) {
        uint32_t* row = tile + y * t.pitch;
        row[0] = row[1];
        row[t.columns + 1] = row[t.columns];
      }
    }
  }
}

// Where a pixel is read: the upper left tap, counted in the window with its border, and the fractions. kUnit: of what is
// interpolated there; kFrom: what that is counted from.
struct Place {
  static constexpr float kUnit = 1, kFrom = 0;
  bool inside;
  int left, top;
  float fx, fy;
};

// The place of a point outside, which is as good as any.
WARP_INLINE Place nowhere() { return {false, 1, 1, 0, 0}; }

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

// A point in float32, counted from the window's centre. `closest` becomes its distance to the window's border, if that is
// less. x, y: from the centre of the output.
struct CentredPoint { float u, v; bool inside; };

constexpr float kFar = 1e30f;

// Whether float32 cannot tell of the closest point on which side of the border it lies.
WARP_INLINE bool doubtful(const CentredMap& m, float closest) { return !(closest > fmaxf(m.doubt_u, m.doubt_v)); }

WARP_INLINE CentredPoint centred_point(const CentredMap& m, float x, float y, float& closest) {
  const float inverse = inverse_of(fmaf(m.g, x, fmaf(m.h, y, m.w)));
  const float u = fmaf(m.au, x, fmaf(m.bu, y, m.cu)) * inverse, v = fmaf(m.av, x, fmaf(m.bv, y, m.cv)) * inverse;
  const float past = fmaxf(fabsf(u) - m.half_u, fabsf(v) - m.half_v);
  closest = fminf(closest, fabsf(past));
  return {u, v, past < 0};
}

WARP_INLINE Place place(const CentredMap& m, float x, float y, float& closest) {
  const CentredPoint point = centred_point(m, x, y, closest);
  if (!point.inside) return nowhere();
  const float column = point.u + (m.half_u + 0.5f), row = point.v + (m.half_v + 0.5f);
  const float left = floor_among(column), top = floor_among(row);
  return {true, static_cast<int>(bits_of(left) & 0x7fffffu), static_cast<int>(bits_of(top) & 0x7fffffu),
          column - (left - 8388608.0f), row - (top - 8388608.0f)};
}

WARP_INLINE FixedPlace fixed_place(const CentredMap& m, int pitch, float x, float y, float& closest) {
  const CentredPoint point = centred_point(m, x, y, closest);
  const uint32_t column = bits_of(fmaf(point.u, 32768.0f, (m.half_u + 0.5f) * 32768.0f + 8388608.0f));
  const float row = point.v + (m.half_v + 0.5f), top = floor_among(row);
  const uint32_t wide = static_cast<uint32_t>(pitch);  // less what the bits of 2^23 add to row and column
  const uint32_t at = bits_of(top) * wide + (column >> 15) - (0x4b000000u * wide + 0x9600u);
  return {point.inside, point.inside ? static_cast<int>(at) : 0, (column & 32767u) * 65535u + 32768u,
          row - (top - 8388608.0f)};
}

// In float64.
WARP_INLINE Place exact_place(const Coefficients& k, const View& view, int row, int column) {
  const Point point = source_point(k, row, column);
  if (!inside(view, point)) return nowhere();
  const double u = point.u - view.left + 0.5, v = point.v - view.top + 0.5;
  const int left = static_cast<int>(u), top = static_cast<int>(v);
  return {true, left, top, static_cast<float>(u - left), static_cast<float>(v - top)};
}

// The four words of one plane around a place: from the tile, or from the image itself.
template <typename In, bool kStaged, int kChannels>
WARP_INLINE void load_taps(const Warp& w, const Tile& t, const uint32_t* tile, const Place& p, int plane,
                           uint32_t (&words)[4]) {
  if constexpr (kStaged) {
    const uint32_t* from = tile + plane * t.plane + (p.top * t.pitch + p.left);
    words[0] = from[0], words[1] = from[1], words[2] = from[t.pitch], words[3] = from[t.pitch + 1];
  } else {
    const int width = static_cast<int>(w.width), height = static_cast<int>(w.height);
    for (int i = 0; i < 4; ++i) {
      const int row = p.top - 1 + i / 2, column = p.left - 1 + i % 2;
      const int y = t.down + (row < 0 ? 0 : row < t.rows ? row : t.rows - 1);
      const int x = t.origin + t.step * (column < 0 ? 0 : column < t.columns ? column : t.columns - 1);
      const bool black = !p.inside || y < 0 || y >= height || x < 0 || x >= width;
      const In* image = static_cast<const In*>(w.images) + t.image * w.stride_n;
      words[i] = black ? 0 : load_word<In, kChannels>(w, image + y * w.stride_h + x * w.stride_w, plane);
    }
  }
}

template <typename In, bool kStaged, int kChannels>
WARP_INLINE void load_taps(const Warp&, const Tile& t, const uint32_t* tile, const FixedPlace& p, int plane,
                           uint32_t (&words)[4]) {
  const uint32_t* from = tile + plane * t.plane + p.at;
  words[0] = from[0], words[1] = from[1], words[2] = from[t.pitch], words[3] = from[t.pitch + 1];
}

// One channel of four words, interpolated.
template <typename In>
WARP_INLINE float interpolate(const uint32_t (&words)[4], int i, const Place& p) {
  float t[4];
  for (int k = 0; k < 4; ++k) {
    t[k] = std::is_same_v<In, float> ? float_of(words[k]) : static_cast<float>(words[k] >> 8 * i & 255u);
  }
  const float fx = p.fx, fy = p.fy, gx = 1 - fx, gy = 1 - fy;
  return fmaf(fmaf(t[0], gx, t[1] * fx), gy, fmaf(t[2], gx, t[3] * fx) * fy);
}

// 2^23 and the weighted sum of byte i of two words.
WARP_INLINE float weighted_among(uint32_t left, uint32_t right, int i, uint32_t weights) {
  const uint32_t bytes = bytes_of(left, right, static_cast<uint32_t>((4 + i) << 4 | i));
#ifdef __CUDA_ARCH__
  return float_of(__dp2a_lo(weights, bytes, 0x4b000000u));
#else
  return float_of((weights & 65535u) * (bytes & 255u) + (weights >> 16) * (bytes >> 8 & 255u) + 0x4b000000u);
#endif
}

template <typename In>
WARP_INLINE float interpolate(const uint32_t (&words)[4], int i, const FixedPlace& p) {
  const float above = weighted_among(words[0], words[1], i, p.weights);
  const float below = weighted_among(words[2], words[3], i, p.weights);
  return fmaf(p.fy, below - above, above);
}

// The value outside the image, in the output's range where that has one.
template <typename Out>
WARP_INLINE float fill_value(const Warp& w) {
  const float fill = static_cast<float>(w.fill);
  if (!std::is_same_v<Out, uint8_t>) return fill;
  return fill > 0.0f ? (fill < 255.0f ? fill : 255.0f) : 0.0f;  // NaN: 0
}

// To the type of the output. uint8: a value in [0, 255], which the addition rounds to the nearest, ties to even.
template <typename Out>
WARP_INLINE Out converted(float value) {
  if constexpr (std::is_same_v<Out, uint8_t>) {
    return static_cast<uint8_t>(bits_of(value + 8388608.0f));
  } else {
    return static_cast<Out>(value);
  }
}

// Neighbouring pixels of one channel: four in one store, which the compiler would not make of it by itself.
template <typename Out, int kPixels>
WARP_INLINE void store(Out* out, const float (&values)[kPixels]) {
  if constexpr (kPixels == 4 && std::is_same_v<Out, uint8_t>) {
    uint32_t rounded[4];
    for (int j = 0; j < 4; ++j) rounded[j] = bits_of(values[j] + 8388608.0f);
    const uint32_t left = bytes_of(rounded[0], rounded[1], 0x0040), right = bytes_of(rounded[2], rounded[3], 0x0040);
    const uint32_t all = bytes_of(left, right, 0x5410);
#ifdef __CUDA_ARCH__
    asm volatile("st.global.b32 [%0], %1;" ::"l"(__cvta_generic_to_global(out)), "r"(all) : "memory");
#else
    memcpy(out, &all, sizeof all);
#endif
#ifdef __CUDA_ARCH__
  } else if constexpr (kPixels == 4 && std::is_same_v<Out, float>) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(out)), "f"(values[0]),
                 "f"(values[1]), "f"(values[2]), "f"(values[3]) : "memory");
  } else if constexpr (kPixels == 4) {
    union { __nv_bfloat162 pair; uint32_t bits; } left, right;
    left.pair = __floats2bfloat162_rn(values[0], values[1]), right.pair = __floats2bfloat162_rn(values[2], values[3]);
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(out)), "r"(left.bits),
                 "r"(right.bits) : "memory");
#endif
  } else {
    for (int j = 0; j < kPixels; ++j) out[j] = converted<Out>(values[j]);
  }
}

// What an interpolated value becomes, inside: value * scale + shift; and what is written outside.
struct Normalization { float scale, shift, fill; };

template <typename Out, typename AnyPlace>
WARP_INLINE Normalization normalization_of(const Warp& w, int channel) {
  const float scale = w.scale ? w.scale[channel] : 1.0f, shift = w.shift ? w.shift[channel] : 0.0f;
  const float from = AnyPlace::kFrom > 0 ? fmaf(-AnyPlace::kFrom * AnyPlace::kUnit, scale, shift) : shift;
  return {scale * AnyPlace::kUnit, from, fmaf(fill_value<Out>(w), scale, shift)};
}

// Whether a value may be counted from elsewhere than 0: that times the scale is not too large for a float.
WARP_INLINE bool moderate(float shift) { return fabsf(shift) < kFar; }

// Of a pixel within an image: those that fit into shared memory are small.
template <bool kStaged>
using Offset = std::conditional_t<kStaged, int, int64_t>;

// kPixels pixels beside each other, whose places are known, to `out`. kChannels: their number, with what normalises them
// in registers; 0: any.
template <typename In, typename Out, bool kStaged, int kChannels, int kPixels, typename AnyPlace>
WARP_INLINE void write_pixels(const Warp& w, const Tile& t, const uint32_t* tile, const AnyPlace (&places)[kPixels],
                              const Normalization* known, Out* out) {
  const int channels = channels_of<kChannels>(w);
  const Offset<kStaged> pixels = static_cast<Offset<kStaged>>(w.height) * static_cast<Offset<kStaged>>(w.width);
  UNROLL for (int plane = 0; plane * kPacked<In> < channels; ++plane) {
    float made[kPacked<In>][kPixels];
    UNROLL for (int j = 0; j < kPixels; ++j) {
      uint32_t words[4];
      load_taps<In, kStaged, kChannels>(w, t, tile, places[j], plane, words);
      UNROLL for (int i = 0; i < kPacked<In>; ++i) {
        const int c = plane * kPacked<In> + i;
        if (c >= channels) break;
        const Normalization k = kChannels > 0 ? known[c] : normalization_of<Out, AnyPlace>(w, c);
        const float value = fmaf(interpolate<In>(words, i, places[j]), k.scale, k.shift);
        made[i][j] = selected(places[j].inside, value, k.fill);
      }
    }
    UNROLL for (int i = 0; i < kPacked<In>; ++i) {
      const int c = plane * kPacked<In> + i;
      if (c < channels) store<Out, kPixels>(out + c * pixels, made[i]);
    }
  }
}

// Those of a thread's pixels that float32 cannot place, or all, in float64. Few come here, and the common way stays short.
template <typename In, typename Out, bool kStaged, int kChannels, int kPixels>
WARP_APART void sample_exactly(const Warp& w, int64_t n, const CentredMap& m, const Tile& t, const uint32_t* tile,
                               int first_row, int past_row, int thread, bool all, Out* output) {
  constexpr int kAcross = 32 / kPixels;
  const int width = static_cast<int>(w.width), height = static_cast<int>(w.height);
  const float x0 = 0.5f - 0.5f * width, y0 = 0.5f - 0.5f * height;
  const Coefficients k = load_coefficients(w, n);
  const View view = load_view(w, n);
  for (int row = first_row + thread / kAcross; row < past_row; row += kImageThreads / kAcross) {
    for (int start = kPixels * (thread % kAcross); start < width; start += 32) {
      for (int column = start; column < start + kPixels; ++column) {
        float closest = kFar;
        centred_point(m, x0 + static_cast<float>(column), y0 + static_cast<float>(row), closest);
        if (!all && !doubtful(m, closest)) continue;
        const Place places[1] = {exact_place(k, view, row, column)};
        write_pixels<In, Out, kStaged, 0, 1>(w, t, tile, places, nullptr,
                                             output + static_cast<Offset<kStaged>>(row) * width + column);
      }
    }
  }
}

// The pixels of output rows [first_row, past_row) of one image. Those that float32 cannot place are done once more.
template <typename In, typename Out, bool kStaged, int kChannels, int kPixels>
WARP_INLINE void sample(const Warp& w, int64_t n, const CentredMap& shared_map, const Tile& t, const uint32_t* tile,
                        int first_row, int past_row, int thread, Out* output) {
  constexpr int kAcross = 32 / kPixels;  // threads beside each other, which do 32 pixels
  const CentredMap m = shared_map;       // in registers
  constexpr bool kFixed = std::is_same_v<In, uint8_t> && kStaged && kPixels == 4;
  using AnyPlace = std::conditional_t<kFixed, FixedPlace, Place>;
  const int width = static_cast<int>(w.width), height = static_cast<int>(w.height);
  Normalization known[kChannels > 0 ? kChannels : 1];
  for (int c = 0; c < kChannels; ++c) known[c] = normalization_of<Out, AnyPlace>(w, c);
  const float x0 = 0.5f - 0.5f * width, y0 = 0.5f - 0.5f * height;
  float closest = kFar;
  bool all = m.exact;
  if constexpr (kFixed) {
    for (int c = 0; c < channels_of<kChannels>(w); ++c) {
      all = all || !moderate(kChannels > 0 ? known[c].shift : normalization_of<Out, AnyPlace>(w, c).shift);
    }
  }
  for (int row = first_row + thread / kAcross; row < past_row && !all; row += kImageThreads / kAcross) {
    for (int column = kPixels * (thread % kAcross); column < width; column += 32) {
      const float first = x0 + static_cast<float>(column), y = y0 + static_cast<float>(row);
      AnyPlace places[kPixels];
      UNROLL for (int j = 0; j < kPixels; ++j) {
        if constexpr (kFixed) {
          places[j] = fixed_place(m, t.pitch, first + j, y, closest);
        } else {
          places[j] = place(m, first + j, y, closest);
        }
      }
      write_pixels<In, Out, kStaged, kChannels, kPixels>(w, t, tile, places, known,
                                                         output + static_cast<Offset<kStaged>>(row) * width + column);
    }
  }
  if (!all && !doubtful(m, closest)) return;
  sample_exactly<In, Out, kStaged, kChannels, kPixels>(w, n, shared_map, t, tile, first_row, past_row, thread, all,
                                                       output);
}

// -------------------------------------------------------------------------------------------------- small uint8 images
//
// Images of three uint8 channels and at most 32 x 32 pixels, a warp for each: nothing is done once a warp that could be
// done once an image, and no warp waits for another. In shared memory lies what two rows below each other have in one
// column, ready for an instruction that adds two products of a weight and a byte: `kCellPlane` words of red above, red
// below, green above, green below, then as many of blue above, blue below, and the same of the column to the right. Three
// loads are all that a pixel needs, some 45 instructions in all (SASS for sm_90). The row is in fixed point, as the column
// above, and as exact. Cells lie as in the source: a flip is in the map. A cell of the fill is what is read outside.

constexpr int kSmallImages = 4;              // of a block
constexpr int kSmallSide = 32;
constexpr int kCellPitch = kSmallSide + 3;   // odd, and so is nine times that: see make_cells
constexpr int kFillCell = (kSmallSide + 1) * kCellPitch;  // and the next one
constexpr int kCellPlane = kFillCell + 2;
constexpr int kCellWords = 2 * kCellPlane;   // of an image

// What a warp has to know of its image. The map is as in CentredMap, but for v, which counts in such units that the window
// is as high as it is wide, and u, which counts from the right where the view is flipped.
struct SmallImage {
  float au, bu, cu, av;
  float bv, cv, g, h;
  float w, half, doubt, column;  // column: to add to u for a column counted in the window with its border
  float row_scale, row;          // the same of v, in 1 / 32768 of a row, and 2^23
  int rows, columns;             // of the window
  int first, down;               // source column and row of its upper left corner, beyond the image perhaps
  int image;                     // -1: the index is out of range
  int exact;                     // as in CentredMap
};

WARP_INLINE SmallImage make_small(const Warp& w, int64_t n) {
  const View view = load_view(w, n);
  const CentredMap m = centre(load_coefficients(w, n), view, w.height, w.width);
  const int rows = static_cast<int>(view.bottom - view.top), columns = static_cast<int>(view.end - view.left);
  const int left = static_cast<int>(view.left), right = static_cast<int>(view.right), width = static_cast<int>(w.width);
  const bool any = rows > 0 && columns > 0;
  const float side = any ? m.half_u / m.half_v : 1.0f, other = any ? m.half_v / m.half_u : 1.0f;
  const float sign = view.flip ? -1.0f : 1.0f, half = any ? m.half_u : 0.0f;
  return {sign * m.au, sign * m.bu, sign * m.cu, side * m.av, side * m.bv, side * m.cv, m.g, m.h, m.w, half,
          fmaxf(m.doubt_u, side * m.doubt_v) * 1.125f, m.half_u + 0.5f, other * 32768.0f,
          (m.half_v + 0.5f) * 32768.0f + 8388608.0f, rows, columns,
          view.flip ? right + width - left - columns : right + left, static_cast<int>(view.top + view.down),
          static_cast<int>(view.image), m.exact};
}

// What normalises three channels: value * scale + shift, of values counted in 1 / 32768 and from 2^23.
struct SmallNormalization { float scale[3], shift[3]; };

WARP_INLINE void make_small_normalization(const Warp& w, int channel, SmallNormalization& k) {
  const float scale = w.scale ? w.scale[channel] : 1.0f, shift = w.shift ? w.shift[channel] : 0.0f;
  k.scale[channel] = scale * (1.0f / 32768);
  k.shift[channel] = fmaf(-256.0f, scale, shift);
}

// The steps of a warp, each done by all its lanes before the next begins.

// Of the image, and of its window.
struct SmallSizes { int width, height, rows, columns; };

// kWhole: 32 x 32 pixels beside each other in memory, planes too, and no window. Everything is counted from registers and
// constants then.
template <bool kWhole>
WARP_INLINE SmallSizes sizes_of(const Warp& w, const SmallImage& t) {
  if constexpr (kWhole) {
    return {kSmallSide, kSmallSide, kSmallSide, kSmallSide};
  } else {
    return {static_cast<int>(w.width), static_cast<int>(w.height), t.rows, t.columns};
  }
}

// Four pixels of a source row; black beyond the image.
struct FourPixels { uint32_t red, green, blue; };

// Eight lanes beside each other have the columns, four below each other as many rows of cells each, of which there is one
// more than there are rows: nine, and as many rows apart all lanes write to different banks.
template <bool kWhole>
WARP_INLINE void make_cells(const Warp& w, const SmallImage& t, bool by_fours, uint32_t* cells, int lane) {
  constexpr int kMostRows = kSmallSide / 4 + 1;
  const auto sizes = sizes_of<kWhole>(w, t);
  const int x = 4 * (lane % 8), each = sizes.rows / 4 + 1, begin = lane / 8 * each, start = x - t.first;
  const bool across = x < sizes.width;
  const int64_t stride_h = kWhole ? kSmallSide : w.stride_h, stride_w = kWhole ? 1 : w.stride_w;
  const int64_t stride_c = kWhole ? kSmallSide * kSmallSide : w.stride_c;
  const uint8_t* image = static_cast<const uint8_t*>(w.images) + t.image * w.stride_n + (t.down + begin) * stride_h +
                         x * stride_w;
  const auto load = [&](int i, int right) -> FourPixels {  // row `begin` + i of the window, which may lie anywhere
    const int y = t.down + begin + i;
    const bool black = !across || x + right >= sizes.width || y < 0 || y >= sizes.height;
    const uint8_t* from = image + i * stride_h + right * stride_w;
    const auto four = [&](const uint8_t* pixels) -> uint32_t {
      if (kWhole || by_fours) return *reinterpret_cast<const uint32_t*>(pixels);
      return pixels[0] | pixels[stride_w] << 8 | pixels[2 * stride_w] << 16 |
             static_cast<uint32_t>(pixels[3 * stride_w]) << 24;
    };
    return {black ? 0 : four(from), black ? 0 : four(from + stride_c), black ? 0 : four(from + 2 * stride_c)};
  };
  FourPixels above = load(-1, 0), rows[kMostRows];
  UNROLL for (int i = 0; i < kMostRows; ++i) rows[i] = load(i, 0);
  if (begin == 0) above = rows[0];
  bool seen[4];
  UNROLL for (int j = 0; j < 4; ++j) {
    seen[j] = across && static_cast<unsigned>(start + j) < static_cast<unsigned>(sizes.columns);
  }
  uint32_t* to = cells + (begin * kCellPitch + start + 1);
  UNROLL for (int i = 0; i < kMostRows; ++i, to += kCellPitch) {
    const bool border = kWhole ? i == 5 && lane >= 24 : begin + i == sizes.rows;
    const FourPixels below = border ? above : rows[i];
    const uint32_t red[2] = {bytes_of(above.red, below.red, 0x5140), bytes_of(above.red, below.red, 0x7362)};
    const uint32_t green[2] = {bytes_of(above.green, below.green, 0x5140), bytes_of(above.green, below.green, 0x7362)};
    const uint32_t first = bytes_of(above.blue, below.blue, 0x5140), last = bytes_of(above.blue, below.blue, 0x7362);
#ifdef __CUDA_ARCH__
    const uint32_t next = __shfl_down_sync(~0u, first, 1, 8);  // of the pixels to the right
#else
    const uint32_t next = bytes_of(i > 0 || begin > 0 ? load(i - 1, 4).blue : load(0, 4).blue,
                                   load(border ? i - 1 : i, 4).blue, 0x5140);
#endif
    const uint32_t blue[4] = {first, bytes_of(above.blue, below.blue, 0x6251), last, bytes_of(last, next, 0x5432)};
    above = below;
    if (kWhole ? i >= 6 && lane >= 24 : i >= each || begin + i > sizes.rows) continue;
    UNROLL for (int j = 0; j < 4; ++j) {
      if (seen[j]) {
        to[j] = bytes_of(red[j / 2], green[j / 2], j % 2 ? 0x7632 : 0x5410);
        to[j + kCellPlane] = blue[j];
      }
    }
  }
}

// What lies beside: black where the crop reaches beyond the image, then the border, repeated. A lane has a row, and the
// last one two.
template <bool kWhole>
WARP_INLINE void make_sides(const Warp& w, const SmallImage& t, uint32_t fill, uint32_t* cells, int lane) {
  const auto sizes = sizes_of<kWhole>(w, t);
  if (lane < 2) cells[kFillCell + lane] = cells[kFillCell + kCellPlane + lane] = fill * 0x01010101u;
  if (lane >= sizes.rows || sizes.columns <= 0) return;
  int begin = t.first < 0 ? -t.first : 0;
  int end = sizes.width - t.first < sizes.columns ? sizes.width - t.first : sizes.columns;
  if (begin >= end) begin = end = sizes.columns;  // nothing but black
  uint32_t* to = cells + lane * kCellPitch;
  const auto put = [&](int x, uint32_t word) {
    to[x] = word;
    if (lane == sizes.rows - 1) to[x + kCellPitch] = bytes_of(word, 0, 0x3311);
  };
  for (int x = 1; x <= begin; ++x) {
    put(x, 0);
    put(x + kCellPlane, x == begin && begin < end ? to[x + 1 + kCellPlane] << 16 : 0);
  }
  if (begin < end && end < sizes.columns) put(end + kCellPlane, to[end + kCellPlane] & 0xffffu);
  for (int x = end + 1; x <= sizes.columns; ++x) put(x, 0), put(x + kCellPlane, 0);
  put(0, to[1]);
  put(sizes.columns + 1, to[sizes.columns]);
  put(kCellPlane, bytes_of(to[1 + kCellPlane], 0, 0x1010));
  put(sizes.columns + kCellPlane, bytes_of(to[sizes.columns + kCellPlane], 0, 0x1010));
}

// Where cells lie, as a number to count with.
#ifdef __CUDA_ARCH__
using Address = uint32_t;
WARP_INLINE Address address_of(const uint32_t* shared) { return static_cast<Address>(__cvta_generic_to_shared(shared)); }
#else
using Address = uintptr_t;
WARP_INLINE Address address_of(const uint32_t* shared) { return reinterpret_cast<Address>(shared); }
#endif

template <int kWords>
WARP_INLINE uint32_t word_at(Address address) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1+%2];" : "=r"(word) : "r"(address), "n"(4 * kWords));
  return word;
#else
  return reinterpret_cast<const uint32_t*>(address)[kWords];
#endif
}

// As weighted_among, of bytes 0 and 1 of a word, or 2 and 3: 2^23 and the sum.
WARP_INLINE float weighted_low(uint32_t bytes, uint32_t weights) {
#ifdef __CUDA_ARCH__
  return float_of(__dp2a_lo(weights, bytes, 0x4b000000u));
#else
  return float_of((weights & 65535u) * (bytes & 255u) + (weights >> 16) * (bytes >> 8 & 255u) + 0x4b000000u);
#endif
}

WARP_INLINE float weighted_high(uint32_t bytes, uint32_t weights) {
#ifdef __CUDA_ARCH__
  return float_of(__dp2a_hi(weights, bytes, 0x4b000000u));
#else
  return weighted_low(bytes >> 16, weights);
#endif
}

// Numerators and denominator of a pixel; those beside it follow by addition.
struct SmallPoint { float u, v, w; };

WARP_INLINE SmallPoint beside(const SmallImage& m, const SmallPoint& p, int pixels) {
  if (pixels == 0) return p;
  const float x = static_cast<float>(pixels);
  return {fmaf(m.au, x, p.u), fmaf(m.av, x, p.v), fmaf(m.g, x, p.w)};
}

WARP_INLINE SmallPoint below(const SmallImage& m, const SmallPoint& p, float y) {
  return {fmaf(m.bu, y, p.u), fmaf(m.bv, y, p.v), fmaf(m.h, y, p.w)};
}

WARP_INLINE SmallPoint small_column(const SmallImage& m, float x) {
  return {fmaf(m.au, x, m.cu), fmaf(m.av, x, m.cv), fmaf(m.g, x, m.w)};
}

// How far outside, by the larger of both distances; within m.doubt of 0 float32 cannot tell.
WARP_INLINE float distance(const SmallImage& m, float u, float v) { return fmaxf(fabsf(u), fabsf(v)) - m.half; }

template <typename Out>
WARP_APART void sample_small_exactly(const Warp& w, int64_t n, const SmallImage& m, const uint32_t* cells, int lane,
                                     Out* output) {
  const int width = static_cast<int>(w.width), height = static_cast<int>(w.height), start = 4 * (lane % 8);
  const Coefficients k = load_coefficients(w, n);
  const View view = load_view(w, n);
  const SmallPoint above = small_column(m, static_cast<float>(start) + (0.5f - 0.5f * width));
  for (int row = lane / 8; row < height && start < width; row += 4) {
    const SmallPoint leftmost = below(m, above, static_cast<float>(row) + (0.5f - 0.5f * height));
    for (int j = 0; j < 4; ++j) {
      const SmallPoint p = beside(m, leftmost, j);
      const float inverse = inverse_of(p.w);
      if (!m.exact && fabsf(distance(m, p.u * inverse, p.v * inverse)) > m.doubt) continue;
      Place place = exact_place(k, view, row, start + j);
      if (view.flip && place.inside) {
        place.left = m.columns + (place.fx > 0 ? 0 : 1) - place.left;
        place.fx = place.fx > 0 ? 1 - place.fx : 0;
      }
      const uint32_t* from = cells + (place.top * kCellPitch + place.left);
      for (int c = 0; c < 3; ++c) {
        const Normalization normalization = normalization_of<Out, Place>(w, c);
        float value = normalization.fill;
        if (place.inside) {
          const uint32_t left = c < 2 ? from[0] >> 16 * c : from[kCellPlane], right = c < 2 ? from[1] >> 16 * c : left >> 16;
          const uint32_t words[4] = {left & 255u, right & 255u, left >> 8 & 255u, right >> 8 & 255u};
          value = fmaf(interpolate<uint8_t>(words, 0, place), normalization.scale, normalization.shift);
        }
        output[(c * height + row) * width + start + j] = converted<Out>(value);
      }
    }
  }
}

template <typename Out, bool kWhole>
WARP_INLINE void sample_small(const Warp& w, int64_t n, const SmallImage& shared, const SmallNormalization& normalization,
                              const uint32_t* cells, int lane, Out* output) {
  const SmallImage m = shared;  // in registers
  const SmallNormalization k = normalization;
  const auto sizes = sizes_of<kWhole>(w, m);
  const int width = sizes.width, height = sizes.height, start = 4 * (lane % 8);
  const SmallPoint above = small_column(m, static_cast<float>(start) + (0.5f - 0.5f * width));
  float y = static_cast<float>(lane / 8) + (0.5f - 0.5f * height);
  float closest = kFar;  // to the window's border, of all the points
  bool again = m.exact;
  for (int c = 0; c < 3; ++c) again = again || !moderate(k.shift[c]);
  Out* out = output + (lane / 8 * width + start);
  const Address outside = address_of(cells + kFillCell);
  // Less what the bits of 2^23 add to row and column.
  const Address origin = address_of(cells) - 4 * static_cast<Address>(0x9600u * kCellPitch + 0x4b000000u);
  for (int row = lane / 8; row < height && start < width && !again; row += 4, y += 4.0f, out += 4 * width) {
    const SmallPoint leftmost = below(m, above, y);
    float made[3][4];
    UNROLL for (int j = 0; j < 4; ++j) {
      const SmallPoint p = beside(m, leftmost, j);
      const float inverse = inverse_of(p.w), u = p.u * inverse, v = p.v * inverse, past = distance(m, u, v);
      closest = fminf(closest, fabsf(past));
      const float column = u + m.column, left = floor_among(column), fx = column - (left - 8388608.0f);
      const uint32_t fixed = bits_of(fmaf(v, m.row_scale, m.row)), weights = (fixed & 32767u) * 65535u + 32768u;
      const Address at = origin + 4 * static_cast<Address>((fixed >> 15) * kCellPitch + bits_of(left));
      const Address from = past < 0.0f ? at : outside;
      const uint32_t words[3] = {word_at<0>(from), word_at<1>(from), word_at<kCellPlane>(from)};
      const float values[3][2] = {{weighted_low(words[0], weights), weighted_low(words[1], weights)},
                                  {weighted_high(words[0], weights), weighted_high(words[1], weights)},
                                  {weighted_low(words[2], weights), weighted_high(words[2], weights)}};
      UNROLL for (int c = 0; c < 3; ++c) {
        made[c][j] = fmaf(fmaf(fx, values[c][1] - values[c][0], values[c][0]), k.scale[c], k.shift[c]);
      }
    }
    UNROLL for (int c = 0; c < 3; ++c) store<Out, 4>(out + c * height * width, made[c]);
  }
  if (again || !(closest > m.doubt)) sample_small_exactly<Out>(w, n, shared, cells, lane, output);
}

// How the images of a call are worked on.
struct Plan {
  size_t bytes;       // of a block's copy of an image
  bool staged;        // whether that fits into shared memory
  bool reads_fours;   // whether four uint8 pixels can be loaded at once
  bool writes_fours;  // whether four pixels of a channel can be stored at once
  bool small, whole;  // whether a warp can do an image, and whether it has 32 x 32 pixels that lie beside each other
  int64_t rows;       // of a block: all of a staged image; of a larger one, a block has some rows
};

template <typename In, typename Out>
Plan make_plan(const Warp& w, const void* output) {
  constexpr size_t most = (48 << 10) - sizeof(CentredMap) - sizeof(Tile);  // every device grants 48 KiB unasked
  const auto fours = [](int64_t value) { return value % 4 == 0; };
  Plan plan;
  plan.bytes = sizeof(uint32_t) * planes_of<In, 0>(w) * (w.height + 2) * ((w.width + 2) | 1);
  plan.staged = plan.bytes <= most;
  plan.reads_fours = std::is_same_v<In, uint8_t> && w.stride_w == 1 && fours(w.width) && fours(w.stride_h) &&
                     fours(w.stride_c) && fours(w.stride_n) && fours(reinterpret_cast<intptr_t>(w.images));
  plan.writes_fours = plan.staged && fours(w.width) && reinterpret_cast<uintptr_t>(output) % (4 * sizeof(Out)) == 0 &&
                      (std::is_same_v<In, float> || w.width <= kMostFixedColumns);
  plan.small = std::is_same_v<In, uint8_t> && plan.writes_fours && w.channels == 3 && w.width <= kSmallSide &&
               w.height <= kSmallSide && w.num_images < INT32_MAX && w.fill >= 0 && w.fill <= 255 &&
               w.fill == std::floor(w.fill);
  plan.whole = plan.reads_fours && w.width == kSmallSide && w.height == kSmallSide && w.stride_h == kSmallSide &&
               w.stride_c == kSmallSide * kSmallSide && w.window == nullptr;
  const int64_t some = 4096 / w.width / 8 * 8;
  plan.rows = plan.staged ? w.height : some < 8 ? 8 : some;
  return plan;
}

}  // namespace minter
