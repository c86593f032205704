// The warp on the CPU: threads over images, one pass over the output, no temporary but a frame for one image.
//
// Written as plain loops over blocks of pixels that any compiler can vectorise, and compiled three times on x86-64: for
// AVX-512, for AVX2 and for every processor; which one runs is decided when the module is loaded. For uint8 images the
// first two are written by hand (warp_bytes.h), nearly twice as fast. All give the same result to the last bit (products
// and sums are not fused). A source image is first copied into a frame of its own, with its crop and flip applied and
// its border repeated around it, three uint8 channels packed into one 32-bit word a pixel. A tap then needs no clamping,
// and one 64-bit load brings two neighbouring pixels with all their channels. Each step runs over a block of some rows
// before the next begins: its setting up counts for little then, and what one step stores has reached the cache when the
// next one loads it in other pieces.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "warp.h"

#if defined(__GNUC__)
#define ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define ALWAYS_INLINE inline
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define MINTER_X86
#include <immintrin.h>
#if defined(__clang__)
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#endif
#define TARGET_AVX2 __attribute__((target("avx2")))
#endif

namespace minter {
namespace {

using BFloat16 = torch::headeronly::BFloat16;

// ------------------------------------------------------------------------------- blocks of pixels, to be vectorised

constexpr int kLanes = 16;   // the innermost loops have this fixed length
constexpr int kBlock = 256;  // pixels that pass from step to step in the first-level cache: whole rows, or part of one

// Where the pixels of a block are read: the top left tap of each in a frame (0 for those outside), and the fractions.
struct Block {
  alignas(64) int32_t at[kBlock + kLanes];
  alignas(64) int32_t inside[kBlock + kLanes];  // all bits or none
  alignas(64) float fx[kBlock + kLanes], fy[kBlock + kLanes];
};

// A source image as the taps see it: the view's window, cropped and flipped, its border repeated once around it.
struct Frame {
  int64_t rows, columns, pitch;  // of the window; words from one row of the frame to the next
  int64_t planes;                // of 32-bit words: uint8 images, one for every three channels; float, one a channel
  std::vector<uint32_t> words;   // (planes, rows + 2, pitch)
};

template <typename In>
Frame make_frame(const Warp& w) {
  constexpr int64_t packed = kPacked<In>;
  const int64_t planes = (w.channels + packed - 1) / packed, pitch = w.width + 2;
  return {0, 0, pitch, planes, std::vector<uint32_t>(planes * (w.height + 2) * pitch + kLanes)};
}

// A value in a register of its own, of which the compiler knows nothing, so that it makes no vectors of such values.
template <typename T>
ALWAYS_INLINE T apart(T value) {
#if defined(__GNUC__)
  asm("" : "+r"(value));
#endif
  return value;
}

// The word of a pixel: up to three uint8 channels, or one float.
template <int kChannels, typename In>
ALWAYS_INLINE uint32_t pack(const In* __restrict__ pixel, int64_t stride_c) {
  if constexpr (std::is_same_v<In, uint8_t>) {
    uint32_t word = pixel[0];
    if constexpr (kChannels > 1) word |= static_cast<uint32_t>(pixel[stride_c]) << 8;
    if constexpr (kChannels > 2) word |= static_cast<uint32_t>(pixel[2 * stride_c]) << 16;
    return word;
  } else {
    return std::bit_cast<uint32_t>(pixel[0]);
  }
}

// kLanes words of a frame from neighbouring pixels, forwards (kStep 1) or backwards (-1). Where every processor has SSE2,
// with that: compilers widen bytes in many steps.
template <int kChannels, int kStep, typename In>
ALWAYS_INLINE void copy_lanes(uint32_t* __restrict__ words, const In* __restrict__ from, int64_t stride_c) {
  const In* lowest = kStep > 0 ? from : from - (kLanes - 1);
#ifdef MINTER_X86
  const auto load = [](const void* at) { return _mm_loadu_si128(static_cast<const __m128i*>(at)); };
  __m128i fours[4];
  if constexpr (std::is_same_v<In, uint8_t>) {
    const __m128i none = _mm_setzero_si128(), first = load(lowest);
    const __m128i second = kChannels > 1 ? load(lowest + stride_c) : none;
    const __m128i third = kChannels > 2 ? load(lowest + 2 * stride_c) : none;
    const __m128i lower = _mm_unpacklo_epi8(first, second), lower_third = _mm_unpacklo_epi8(third, none);
    const __m128i upper = _mm_unpackhi_epi8(first, second), upper_third = _mm_unpackhi_epi8(third, none);
    fours[0] = _mm_unpacklo_epi16(lower, lower_third), fours[1] = _mm_unpackhi_epi16(lower, lower_third);
    fours[2] = _mm_unpacklo_epi16(upper, upper_third), fours[3] = _mm_unpackhi_epi16(upper, upper_third);
  } else {
    for (int i = 0; i < 4; ++i) fours[i] = load(lowest + 4 * i);
  }
  for (int i = 0; i < 4; ++i) {
    const __m128i four = kStep > 0 ? fours[i] : _mm_shuffle_epi32(fours[3 - i], 0x1b);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(words + 4 * i), four);
  }
#else
  for (int x = 0; x < kLanes; ++x) words[kStep > 0 ? x : kLanes - 1 - x] = pack<kChannels>(lowest + x, stride_c);
#endif
}

// `count` words of a frame from pixels `step` apart.
template <int kChannels, int kStep, typename In>
ALWAYS_INLINE void copy_row(uint32_t* __restrict__ words, const In* __restrict__ from, int64_t step, int64_t stride_c,
                            int64_t count) {
  if (step != kStep || count < kLanes) {
    for (int64_t x = 0; x < count; ++x) words[x] = pack<kChannels>(from + x * step, stride_c);
    return;
  }
  for (int64_t x = 0; x + kLanes <= count; x += kLanes) {
    copy_lanes<kChannels, kStep>(words + x, from + x * kStep, stride_c);
  }
  const int64_t last = count - kLanes;  // what remains, some of it once more
  if (count % kLanes != 0) copy_lanes<kChannels, kStep>(words + last, from + last * kStep, stride_c);
}

// Frame columns [first, past) are source columns origin, origin + step, ...; the others are black.
struct Columns { int64_t origin, step, first, past; };

ALWAYS_INLINE Columns source_columns(const Warp& w, const View& view) {
  const int64_t columns = view.end - view.left;
  if (view.flip) {
    const int64_t origin = view.right + w.width - 1 - view.left, first = clamp(origin - w.width + 1, 0, columns);
    return {origin, -1, first, clamp(origin + 1, first, columns)};
  }
  const int64_t origin = view.right + view.left, first = clamp(-origin, 0, columns);
  return {origin, 1, first, clamp(w.width - origin, first, columns)};
}

// One plane of a frame.
template <int kChannels, typename In>
ALWAYS_INLINE void fill_plane(const Warp& w, const View& view, const Frame& frame, uint32_t* plane, int64_t channel) {
  const In* image = static_cast<const In*>(w.images) + view.image * w.stride_n + channel * w.stride_c;
  const Columns c = source_columns(w, view);
  for (int64_t y = view.top; y < view.bottom; ++y) {
    uint32_t* row = plane + (y - view.top + 1) * frame.pitch + 1;
    const int64_t source = y + view.down;
    if (source < 0 || source >= w.height || c.first == c.past) {
      std::memset(row, 0, frame.columns * sizeof(uint32_t));
      continue;
    }
    for (int64_t x = 0; x < c.first; ++x) row[x] = 0;
    const In* from = image + source * w.stride_h + (c.origin + c.step * c.first) * w.stride_w;
    if (view.flip) {
      copy_row<kChannels, -1>(row + c.first, from, -w.stride_w, w.stride_c, c.past - c.first);
    } else {
      copy_row<kChannels, 1>(row + c.first, from, w.stride_w, w.stride_c, c.past - c.first);
    }
    for (int64_t x = c.past; x < frame.columns; ++x) row[x] = 0;
  }
  for (int64_t y = 1; y <= frame.rows; ++y) {  // afterwards: to read what was just written would wait for it
    uint32_t* row = plane + y * frame.pitch + 1;
    row[-1] = row[0];
    row[frame.columns] = row[frame.columns - 1];
  }
  const size_t bytes = frame.pitch * sizeof(uint32_t);
  std::memcpy(plane, plane + frame.pitch, bytes);
  std::memcpy(plane + (frame.rows + 1) * frame.pitch, plane + frame.rows * frame.pitch, bytes);
}

template <typename In>
ALWAYS_INLINE void fill_frame(const Warp& w, const View& view, Frame& frame) {
  constexpr int64_t packed = kPacked<In>;
  frame.rows = view.bottom - view.top, frame.columns = view.end - view.left;
  if (frame.rows == 0 || frame.columns == 0) return;
  for (int64_t p = 0; p < frame.planes; ++p) {
    uint32_t* plane = frame.words.data() + p * (w.height + 2) * frame.pitch;
    const int64_t left = w.channels - p * packed;
    if (packed == 1 || left == 1) {
      fill_plane<1, In>(w, view, frame, plane, p * packed);
    } else if (left == 2) {
      fill_plane<2, In>(w, view, frame, plane, p * packed);
    } else {
      fill_plane<3, In>(w, view, frame, plane, p * packed);
    }
  }
}

// Selections by bits: a condition would be turned back into a branch by some compilers, and nothing vectorised.
ALWAYS_INLINE float select(int32_t mask, float value, float other) {
  const uint32_t bits = static_cast<uint32_t>(mask);
  return std::bit_cast<float>((std::bit_cast<uint32_t>(value) & bits) | (std::bit_cast<uint32_t>(other) & ~bits));
}

// The blocks of an image: as many whole rows as fit into one, or parts of a row.
struct Blocks {
  int64_t rows, columns;
  std::vector<float> x;  // of each column's centre, counted from the image's; the last one's again beyond the row
};

Blocks make_blocks(const Warp& w) {
  Blocks blocks{std::max<int64_t>(1, kBlock / w.width), std::min<int64_t>(kBlock, w.width), {}};
  blocks.x.resize(w.width + kLanes);
  for (int64_t i = 0; i < w.width + kLanes; ++i) {
    blocks.x[i] = static_cast<float>(std::min(i, w.width - 1) + 0.5 - 0.5 * w.width);
  }
  return blocks;
}

// A point's place in the frame. column, row: border included, within [0.5, size + 0.5]; 0 where mask is.
template <typename Real>
ALWAYS_INLINE void place(const Frame& frame, Real column, Real row, int32_t mask, Block& block, int64_t i) {
  const int32_t left = static_cast<int32_t>(column), top = static_cast<int32_t>(row);
  block.inside[i] = mask;
  block.fx[i] = static_cast<float>(column - static_cast<Real>(left));
  block.fy[i] = static_cast<float>(row - static_cast<Real>(top));
  block.at[i] = top * static_cast<int32_t>(frame.pitch) + left;
}

ALWAYS_INLINE int32_t bits_of(float value) { return std::bit_cast<int32_t>(value); }

// Source points of a block: `rows` rows of `columns` pixels, one after the other. Returns their number rounded up to
// whole vectors, the last of them filled.
ALWAYS_INLINE int locate(const Warp& w, const Blocks& blocks, const Coefficients& k, const CentredMap& m,
                         const View& view, const Frame& frame, int64_t row, int64_t column, int64_t rows,
                         int64_t columns, Block& block) {
  const float* centres = blocks.x.data() + column;
  const float to_column = m.half_u + 0.5f, to_row = m.half_v + 0.5f;
  alignas(64) int32_t doubts[kLanes] = {};  // negative where float32 cannot tell on which side of the border a point is
  for (int64_t r = 0; r < rows && !m.exact; ++r) {
    const float y = static_cast<float>(row + r + 0.5 - 0.5 * w.height);
    const float bu = m.bu * y + m.cu, bv = m.bv * y + m.cv, h = m.h * y + m.w;
    for (int64_t i = 0; i < columns; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const float x = centres[i + lane], inverse = 1.0f / (m.g * x + h);
        const float u = (m.au * x + bu) * inverse, v = (m.av * x + bv) * inverse;
        const float past_u = std::fabs(u) - m.half_u, past_v = std::fabs(v) - m.half_v;
        const int32_t mask = (bits_of(past_u) & bits_of(past_v)) >> 31;  // both negative: all bits, else none
        doubts[lane] |= bits_of(std::fabs(past_u) - m.doubt_u) | bits_of(std::fabs(past_v) - m.doubt_v);
        place(frame, select(mask, u + to_column, 0.0f), select(mask, v + to_row, 0.0f), mask, block,
              r * columns + i + lane);
      }
    }
  }
  int32_t doubt = m.exact ? -1 : 0;
  for (int lane = 0; lane < kLanes; ++lane) doubt |= doubts[lane];
  for (int64_t r = 0; r < rows && doubt < 0; ++r) {
    for (int64_t j = 0; j < columns; ++j) {
      const Point point = source_point(k, row + r, column + j);
      const bool within = inside(view, point);
      place(frame, within ? point.u - view.left + 0.5 : 0.0, within ? point.v - view.top + 0.5 : 0.0,
            -static_cast<int32_t>(within), block, r * columns + j);
    }
  }
  const int wanted = static_cast<int>(rows * columns), count = (wanted + kLanes - 1) / kLanes * kLanes;
  for (int i = wanted; i < count; ++i) block.inside[i] = 0, block.at[i] = 0, block.fx[i] = 0, block.fy[i] = 0;
  return count;
}

// The two upper and the two lower taps of each pixel of the block, side by side.
ALWAYS_INLINE void load_taps(const uint32_t* plane, int64_t pitch, const Block& block, int count,
                             uint32_t* __restrict__ above, uint32_t* __restrict__ below) {
  const uint32_t* under = apart(plane + pitch);
  for (int i = 0; i < count; i += 8) {
    int64_t at[8];
    for (int j = 0; j < 8; ++j) at[j] = apart<int64_t>(block.at[i + j]);
    for (int j = 0; j < 8; ++j) std::memcpy(above + 2 * (i + j), plane + at[j], 2 * sizeof(uint32_t));
    for (int j = 0; j < 8; ++j) std::memcpy(below + 2 * (i + j), under + at[j], 2 * sizeof(uint32_t));
  }
}

template <typename In>
ALWAYS_INLINE float tap(uint32_t word, int shift) {
  if constexpr (std::is_same_v<In, uint8_t>) {
    return static_cast<float>(static_cast<int32_t>((word >> shift) & 255u));
  } else {
    return std::bit_cast<float>(word);
  }
}

// To the type of the output. uint8: value in [0, 255], and the addition rounds it to the nearest, ties to even.
// bfloat16: the bits, likewise rounded.
template <typename Out>
ALWAYS_INLINE auto converted(float value) {
  if constexpr (std::is_same_v<Out, uint8_t>) {
    return static_cast<uint8_t>(std::bit_cast<uint32_t>(value + 8388608.0f));
  } else if constexpr (std::is_same_v<Out, BFloat16>) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
  } else {
    return value;
  }
}

// The value outside the image, in the output's range where that has one.
template <typename Out>
float fill_value(const Warp& w) {
  const float fill = static_cast<float>(w.fill);
  return std::is_same_v<Out, uint8_t> ? (fill > 0.0f ? std::min(fill, 255.0f) : 0.0f) : fill;  // NaN: 0
}

template <typename Out>
ALWAYS_INLINE float normalized(float value, float scale, float offset) {
  return std::is_same_v<Out, uint8_t> ? value : value * scale + offset;  // uint8 is never normalised
}

struct Normalization { float fill, scale[3], offset[3]; };  // of the channels in one word

// uint8 images are blended along a row in fixed point, with so many bits, which changes a value by up to 255 / 2^16 grey
// levels; in float32, products and sums of such numbers are exact, so both give the same bits.
constexpr int kByteBits = 15;

ALWAYS_INLINE float byte_fraction(float fx) {
  constexpr float shift = 1 << (23 - kByteBits);  // beside it, a float32 has no more bits than those
  return (fx + shift) - shift;
}

// One channel of four words, interpolated. uint8: its bits are put into the last places of 2^23, which is then taken
// away; the second channel is taken where it lies, 256 times as large.
template <int kChannel, typename In>
ALWAYS_INLINE float bilinear(uint32_t p00, uint32_t p01, uint32_t p10, uint32_t p11, float fx, float fy) {
  if constexpr (std::is_same_v<In, uint8_t>) {
    fx = byte_fraction(fx);
    const auto among = [](uint32_t word) {
      const uint32_t channel = kChannel == 0 ? word & 0xffu : kChannel == 1 ? word & 0xff00u : word >> 16;
      return std::bit_cast<float>(channel | 0x4b000000u);
    };
    const float t00 = among(p00), t01 = among(p01), t10 = among(p10), t11 = among(p11);
    const float above = (t00 - 8388608.0f) + fx * (t01 - t00), below = (t10 - 8388608.0f) + fx * (t11 - t10);
    const float value = above + fy * (below - above);
    return kChannel == 1 ? value * (1.0f / 256) : value;
  } else {
    const float gx = 1 - fx, gy = 1 - fy;
    return (std::bit_cast<float>(p00) * gx + std::bit_cast<float>(p01) * fx) * gy +
           (std::bit_cast<float>(p10) * gx + std::bit_cast<float>(p11) * fx) * fy;
  }
}

// The kChannels channels of a block's words, interpolated, filled, normalised, converted, each to its own output.
template <int kChannels, typename In, typename Out, typename Stored>
ALWAYS_INLINE void interpolate(const Block& block, const uint32_t* __restrict__ above,
                               const uint32_t* __restrict__ below, const Normalization& k, int count,
                               Stored* __restrict__ first, Stored* __restrict__ second, Stored* __restrict__ third) {
  const float fill = k.fill, scale0 = k.scale[0], scale1 = k.scale[1], scale2 = k.scale[2];
  const float offset0 = k.offset[0], offset1 = k.offset[1], offset2 = k.offset[2];
  for (int j = 0; j < count; ++j) {
    const float fx = block.fx[j], fy = block.fy[j];
    const uint32_t p00 = above[2 * j], p01 = above[2 * j + 1], p10 = below[2 * j], p11 = below[2 * j + 1];
#define VALUE(channel) select(block.inside[j], bilinear<channel, In>(p00, p01, p10, p11, fx, fy), fill)
    first[j] = converted<Out>(normalized<Out>(VALUE(0), scale0, offset0));
    if constexpr (kChannels > 1) second[j] = converted<Out>(normalized<Out>(VALUE(1), scale1, offset1));
    if constexpr (kChannels > 2) third[j] = converted<Out>(normalized<Out>(VALUE(2), scale2, offset2));
#undef VALUE
  }
}

// The next image, which may lie anywhere in memory, is fetched while this one is worked on.
template <typename In>
ALWAYS_INLINE void prefetch(const Warp& w, int64_t n) {
#if defined(__GNUC__)
  const int64_t row = w.width * static_cast<int64_t>(sizeof(In));
  if (w.stride_w != 1 || w.channels * w.height * row > 32768) return;
  const In* image = static_cast<const In*>(w.images) + (w.index ? w.index[n] : n) * w.stride_n;
  const bool dense = w.stride_h == w.width;
  for (int64_t c = 0; c < w.channels; ++c) {
    for (int64_t y = 0; y < (dense ? 1 : w.height); ++y) {
      const char* from = reinterpret_cast<const char*>(image + c * w.stride_c + y * w.stride_h);
      for (int64_t byte = 0; byte < (dense ? w.height * row : row); byte += 64) __builtin_prefetch(from + byte);
    }
  }
#endif
}

template <typename In, typename Out>
ALWAYS_INLINE void forward_images(const Warp& w, int64_t begin, int64_t end, void* all) {
  using Stored = decltype(converted<Out>(0.0f));
  constexpr int64_t packed = kPacked<In>;
  Frame frame = make_frame<In>(w);
  Block block;
  alignas(64) uint32_t above[2 * kBlock], below[2 * kBlock];
  alignas(64) Stored made[3][kBlock + 32];  // written to first: the planes of small images lie 4 KiB apart, which stalls
  const int64_t pixels = w.height * w.width;
  const Blocks blocks = make_blocks(w);
  for (int64_t n = begin; n < end; ++n) {
    const Coefficients coefficients = load_coefficients(w, n);
    const View view = load_view(w, n);
    const CentredMap map = centre(coefficients, view, w.height, w.width);
    fill_frame<In>(w, view, frame);
    if (n + 1 < end) prefetch<In>(w, n + 1);
    Stored* output = static_cast<Stored*>(all) + n * w.channels * pixels;
    for (int64_t y = 0; y < w.height; y += blocks.rows) {
      for (int64_t x = 0; x < w.width; x += blocks.columns) {
        const int64_t rows = std::min(blocks.rows, w.height - y), columns = std::min(blocks.columns, w.width - x);
        const int wanted = static_cast<int>(rows * columns);
        const int count = locate(w, blocks, coefficients, map, view, frame, y, x, rows, columns, block);
        for (int64_t c = 0; c < w.channels; c += packed) {
          const uint32_t* plane = frame.words.data() + c / packed * (w.height + 2) * frame.pitch;
          load_taps(plane, frame.pitch, block, count, above, below);
          const int channels = static_cast<int>(std::min(packed, w.channels - c));
          Stored* to[3];
          Normalization k{fill_value<Out>(w), {1, 1, 1}, {0, 0, 0}};
          for (int i = 0; i < 3; ++i) {
            const int64_t channel = c + std::min(i, channels - 1);
            if (w.scale) k.scale[i] = w.scale[channel];
            if (w.shift) k.offset[i] = w.shift[channel] + 0.0f;  // not -0, so that the sum is not
            to[i] = count == wanted ? output + channel * pixels + y * w.width + x : made[i];
          }
          if (channels == 1) {
            interpolate<1, In, Out>(block, above, below, k, count, to[0], to[1], to[2]);
          } else if (channels == 2) {
            interpolate<2, In, Out>(block, above, below, k, count, to[0], to[1], to[2]);
          } else {
            interpolate<3, In, Out>(block, above, below, k, count, to[0], to[1], to[2]);
          }
          for (int i = 0; count != wanted && i < channels; ++i) {
            std::memcpy(output + (c + i) * pixels + y * w.width + x, made[i], wanted * sizeof(Stored));
          }
        }
      }
    }
  }
}

// ------------------------------------------------------------------------------- uint8 images with AVX-512 and AVX2

#ifdef MINTER_X86
// What warp_bytes.h needs, the same for both.

constexpr int kByteOne = 1 << kByteBits;

struct ByteBlock {
  static constexpr int kMost = kBlock + 2 * 16;  // a register may begin at the last point, and another is read ahead
  alignas(64) int32_t at[kMost];                 // record of the top left tap
  alignas(64) int32_t weights[kMost];            // of left and right, times -2^15 each, in 16 bits; 0 outside
  alignas(64) float fy[kMost];
};

struct ByteChannel { float scale, offset, fill; };  // scale for what is -2^15 times as large; fill normalised

template <typename Out>
std::vector<ByteChannel> byte_channels(const Warp& w) {
  std::vector<ByteChannel> channels(w.channels);
  const float fill = fill_value<Out>(w);
  for (int64_t c = 0; c < w.channels; ++c) {
    const float scale = w.scale ? w.scale[c] : 1.0f, offset = w.shift ? w.shift[c] + 0.0f : 0.0f;
    channels[c] = {scale * (-1.0f / kByteOne), offset, normalized<Out>(fill, scale, offset)};
  }
  return channels;
}

// Records of eight bytes: of each of three channels, the pixel's byte and that of the pixel below.
struct ByteFrame {
  struct alignas(64) Line { uint64_t records[8]; };  // a line of the cache
  int64_t pitch, plane_lines;
  std::vector<Line> lines;

  ByteFrame(const Warp& w, int64_t planes)
      : pitch((w.width + 15) / 16 * 16 + 8), plane_lines(1 + (w.height + 1) * pitch / 8), lines(planes * plane_lines) {}

  uint64_t* plane(int64_t p) {  // 7 records on, so that the window's columns begin at a line
    return reinterpret_cast<uint64_t*>(lines.data() + p * plane_lines) + 7;
  }
};

struct ByteTerms {
  static constexpr int kMost = 256 + 16;  // a register may begin at the last; the last row again for padded groups
  alignas(64) float x[kMost], y[kMost];               // centres, counted from the image's
  alignas(64) float column[3][kMost], row[3][kMost];  // of the denominator, of u and of v

  explicit ByteTerms(const Warp& w) {
    for (int64_t i = 0; i < kMost; ++i) {
      x[i] = static_cast<float>(std::min<int64_t>(i, w.width - 1) + 0.5 - 0.5 * w.width);
      y[i] = static_cast<float>(std::min<int64_t>(i, w.height - 1) + 0.5 - 0.5 * w.height);
    }
  }
};

// The registers that a block's points are computed in: the row and the column each begins at, and which point that is.
struct ByteGroups {
  static constexpr int kTogether = 4;
  struct Group { int64_t row, column, first; };
  int in_row;
  std::vector<Group> all;  // a multiple of kTogether: some of the last once more

  ByteGroups(const Warp& w, int64_t rows, int lanes) : in_row(static_cast<int>((w.width + lanes - 1) / lanes)) {
    for (int64_t y = 0; y < rows; ++y) {
      for (int64_t x = 0; x < w.width; x += lanes) all.push_back({y, x, y * w.width + x});
    }
    while (all.size() % kTogether != 0) all.push_back(all.back());
  }
};

// Whether warp_bytes.h computes this: rows of neighbouring pixels, of 16 to 256, and numbers whose product with a power
// of two is exact.
bool suits_bytes(const Warp& w) {
  const auto sound = [](float value) { return value == 0 || (std::fabs(value) > 1e-30f && std::fabs(value) < 1e30f); };
  for (int64_t c = 0; c < w.channels; ++c) {
    if ((w.scale && !sound(w.scale[c])) || (w.shift && !sound(w.shift[c]))) return false;
  }
  return w.stride_w == 1 && w.width >= 16 && w.width <= 256 && w.height <= 256 && sound(static_cast<float>(w.fill));
}

#define MINTER_TARGET TARGET_AVX512
#define MINTER_LANES 16
#include "warp_bytes.h"
#undef MINTER_TARGET
#undef MINTER_LANES
#define MINTER_TARGET TARGET_AVX2
#define MINTER_LANES 8
#include "warp_bytes.h"
#undef MINTER_TARGET
#undef MINTER_LANES
#endif

// ------------------------------------------------------------------------------------------------------ gradients

// What the gradient of the coefficients needs of each pixel of a block beyond Block; 0 for those outside.
struct Points {
  alignas(64) double x[kBlock], u[kBlock], v[kBlock], inverse[kBlock];
};

ALWAYS_INLINE void locate_points(const Coefficients& k, const Block& block, int64_t row, int64_t column, int count,
                                 Points& points) {
  const double y = row + 0.5, by = product(k.b, y), ey = product(k.e, y), hy = product(k.h, y);
  for (int j = 0; j < count; ++j) {
    const double x = static_cast<double>(static_cast<int32_t>(column) + j) + 0.5;
    const double denominator = k.g * x + hy + 1.0;
    const double u = (k.a * x + by + k.c) / denominator, v = (k.d * x + ey + k.f) / denominator;
    const bool inside = block.inside[j] != 0;
    points.x[j] = x;
    points.u[j] = inside ? u : 0.0, points.v[j] = inside ? v : 0.0;
    points.inverse[j] = inside ? 1.0 / denominator : 0.0;
  }
}

// du, dv += d loss / d (u, v) through one channel.
template <typename In>
ALWAYS_INLINE void add_point_gradients(const Block& block, const uint32_t* __restrict__ above,
                                       const uint32_t* __restrict__ below, int shift, const float* __restrict__ grad,
                                       float scale, int count, float* __restrict__ du, float* __restrict__ dv) {
  for (int j = 0; j < count; ++j) {
    const float fx = block.fx[j], fy = block.fy[j], g = grad[j] * scale;
    const float p00 = tap<In>(above[2 * j], shift), p01 = tap<In>(above[2 * j + 1], shift);
    const float p10 = tap<In>(below[2 * j], shift), p11 = tap<In>(below[2 * j + 1], shift);
    const float along_x = g * ((p01 - p00) * (1 - fy) + (p11 - p10) * fy);
    const float along_y = g * ((p10 - p00) * (1 - fx) + (p11 - p01) * fx);
    du[j] += select(block.inside[j], along_x, 0.0f);
    dv[j] += select(block.inside[j], along_y, 0.0f);
  }
}

// The quotient rule, in kLanes sums of each coefficient's gradient: the order of additions is the same for every target.
ALWAYS_INLINE void add_coefficient_gradients(const Points& points, int64_t row, const float* du, const float* dv,
                                             int count, double (&sums)[8][kLanes]) {
  const double y = row + 0.5;
  for (int i = 0; i < count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int j = i + lane;
      const double gu = du[j] * points.inverse[j], gv = dv[j] * points.inverse[j];
      const double gw = -(gu * points.u[j] + gv * points.v[j]), x = points.x[j];
      sums[0][lane] += gu * x, sums[1][lane] += gu * y, sums[2][lane] += gu;
      sums[3][lane] += gv * x, sums[4][lane] += gv * y, sums[5][lane] += gv;
      sums[6][lane] += gw * x, sums[7][lane] += gw * y;
    }
  }
}

// One channel's gradient of a block of pixels, spread over the taps in a frame of gradients.
ALWAYS_INLINE void scatter(const Block& block, const float* __restrict__ grad, float scale, int64_t pitch, int count,
                           float* __restrict__ frame) {
  alignas(64) float upper[2][kBlock], lower[2][kBlock];
  for (int j = 0; j < count; ++j) {
    const float fx = block.fx[j], fy = block.fy[j], g = select(block.inside[j], grad[j] * scale, 0.0f);
    upper[0][j] = g * ((1 - fx) * (1 - fy)), upper[1][j] = g * (fx * (1 - fy));
    lower[0][j] = g * ((1 - fx) * fy), lower[1][j] = g * (fx * fy);
  }
  for (int j = 0; j < count; ++j) {
    float* to = frame + block.at[j];
    to[0] += upper[0][j], to[1] += upper[1][j];
    to[pitch] += lower[0][j], to[pitch + 1] += lower[1][j];
  }
}

// The reverse of fill_plane for one channel: the repeated border goes back to where it was taken from, and the window to
// its place in the source image (which is zero beforehand).
ALWAYS_INLINE void empty_plane(const Warp& w, const View& view, const Frame& frame, float* plane, float* image) {
  const int64_t pitch = frame.pitch, columns = frame.columns, rows = frame.rows;
  for (int64_t x = 0; x < columns + 2; ++x) {
    plane[pitch + x] += plane[x];
    plane[rows * pitch + x] += plane[(rows + 1) * pitch + x];
  }
  for (int64_t y = view.top; y < view.bottom; ++y) {
    float* row = plane + (y - view.top + 1) * pitch + 1;
    row[0] += row[-1];
    row[columns - 1] += row[columns];
    const int64_t source = y + view.down;
    if (source < 0 || source >= w.height) continue;
    const Columns c = source_columns(w, view);
    for (int64_t x = c.first; x < c.past; ++x) image[source * w.width + c.origin + c.step * x] = row[x];
  }
}

template <typename In>
ALWAYS_INLINE void backward_images(const Warp& w, int64_t begin, int64_t end, const float* all_grad, float* grad_images,
                                   double* grad_coefficients) {
  constexpr int64_t packed = kPacked<In>;
  const int64_t pixels = w.height * w.width;
  Frame frame = make_frame<In>(w);
  const Blocks blocks = make_blocks(w);
  const int64_t plane_words = (w.height + 2) * frame.pitch;
  std::vector<float> gradients(grad_images ? w.channels * plane_words + kLanes : 0);
  Block block;
  Points points;
  alignas(64) uint32_t above[2 * kBlock], below[2 * kBlock];
  alignas(64) float du[kBlock], dv[kBlock], rest[kBlock] = {};
  for (int64_t n = begin; n < end; ++n) {
    const Coefficients coefficients = load_coefficients(w, n);
    const View view = load_view(w, n);
    if (view.top == view.bottom || view.left == view.end) continue;
    const CentredMap map = centre(coefficients, view, w.height, w.width);
    frame.rows = view.bottom - view.top, frame.columns = view.end - view.left;
    if (grad_coefficients) fill_frame<In>(w, view, frame);
    std::fill(gradients.begin(), gradients.end(), 0.0f);
    double sums[8][kLanes] = {};
    for (int64_t y = 0; y < w.height; ++y) {
      for (int64_t x = 0; x < w.width; x += kBlock) {
        const int wanted = static_cast<int>(std::min<int64_t>(kBlock, w.width - x));
        const int count = locate(w, blocks, coefficients, map, view, frame, y, x, 1, wanted, block);
        if (grad_coefficients) {
          locate_points(coefficients, block, y, x, count, points);
          std::memset(du, 0, sizeof du), std::memset(dv, 0, sizeof dv);
        }
        for (int64_t c = 0; c < w.channels; ++c) {
          const float* grad = all_grad + (n * w.channels + c) * pixels + y * w.width + x;
          if (count != wanted) {
            std::memcpy(rest, grad, wanted * sizeof(float));
            grad = rest;
          }
          const float scale = w.scale ? w.scale[c] : 1.0f;
          if (grad_coefficients) {
            if (c % packed == 0) {
              const uint32_t* plane = frame.words.data() + c / packed * plane_words;
              load_taps(plane, frame.pitch, block, count, above, below);
            }
            add_point_gradients<In>(block, above, below, static_cast<int>(c % packed) * 8, grad, scale,
                                    count, du, dv);
          }
          if (grad_images) {
            scatter(block, grad, scale, frame.pitch, count, gradients.data() + c * plane_words);
          }
        }
        if (grad_coefficients) add_coefficient_gradients(points, y, du, dv, count, sums);
      }
    }
    for (int k = 0; grad_coefficients && k < 8; ++k) {
      double sum = 0;
      for (int lane = 0; lane < kLanes; ++lane) sum += sums[k][lane];
      grad_coefficients[n * 8 + k] = sum;
    }
    for (int64_t c = 0; grad_images && c < w.channels; ++c) {
      empty_plane(w, view, frame, gradients.data() + c * plane_words, grad_images + (n * w.channels + c) * pixels);
    }
  }
}

// -------------------------------------------------------------------------------- one pixel after the other, in double

// For float64 images, and for those too large for 32-bit offsets.
template <typename Real, typename In, typename Out>
void forward_plain(const Warp& w, int64_t begin, int64_t end, void* all) {
  const int64_t pixels = w.height * w.width;
  for (int64_t n = begin; n < end; ++n) {
    const Coefficients coefficients = load_coefficients(w, n);
    const View view = load_view(w, n);
    Out* output = static_cast<Out*>(all) + n * w.channels * pixels;
    for (int64_t i = 0; i < pixels; ++i) {
      const Point point = source_point(coefficients, i / w.width, i % w.width);
      const bool is_inside = inside(view, point);
      const Taps<Real> t = is_inside ? taps<Real>(w, view, point) : Taps<Real>{};
      for (int64_t c = 0; c < w.channels; ++c) {
        if constexpr (std::is_same_v<Real, double>) {
          output[c * pixels + i] = minter::normalized(w, is_inside ? bilinear<Real, In>(w, t, c) : w.fill, c);
        } else {
          const Real value = is_inside ? bilinear<Real, In>(w, t, c) : fill_value<Out>(w);
          const auto bits = converted<Out>(minter::normalized(w, value, c));
          std::memcpy(output + c * pixels + i, &bits, sizeof bits);
        }
      }
    }
  }
}

template <typename Real, typename In>
void backward_plain(const Warp& w, int64_t begin, int64_t end, const Real* grad, Real* grad_images,
                    double* grad_coefficients) {
  const int64_t pixels = w.height * w.width;
  Warp target = w;  // offsets into the gradient of the images, which is contiguous and has no index
  target.stride_n = w.channels * pixels, target.stride_h = w.width, target.stride_w = 1;
  for (int64_t n = begin; n < end; ++n) {
    const Coefficients coefficients = load_coefficients(w, n);
    const View view = load_view(w, n);
    const Real* of_image = grad + n * w.channels * pixels;
    double sums[8] = {};
    for (int64_t i = 0; i < pixels; ++i) {
      const Point point = source_point(coefficients, i / w.width, i % w.width);
      if (!inside(view, point)) continue;
      if (grad_coefficients) {
        double du = 0, dv = 0;
        point_gradient<Real, In>(w, taps<Real>(w, view, point), [&](int64_t c) { return of_image[c * pixels + i]; }, du,
                                 dv);
        add_coefficient_gradient(point, du, dv, sums);
      }
      if (!grad_images) continue;
      const Taps<Real> t = taps<Real>(target, view, point);
      for (int k = 0; k < 4; ++k) {
        for (int64_t c = 0; t.at[k] >= 0 && c < w.channels; ++c) {
          const Real scale = w.scale ? static_cast<Real>(w.scale[c]) : Real(1);
          grad_images[t.at[k] + c * pixels] += of_image[c * pixels + i] * scale * tap_weight(t, k);
        }
      }
    }
    if (grad_coefficients) std::copy(sums, sums + 8, grad_coefficients + n * 8);
  }
}

// ------------------------------------------------------------------------------------- one target for each processor

enum class Target { portable, avx2, avx512 };

template <typename In, typename Out>
void forward_portable(const Warp& w, int64_t begin, int64_t end, void* output) {
  forward_images<In, Out>(w, begin, end, output);
}

template <typename In>
void backward_portable(const Warp& w, int64_t begin, int64_t end, const float* grad, float* grad_images,
                       double* grad_coefficients) {
  backward_images<In>(w, begin, end, grad, grad_images, grad_coefficients);
}

#ifdef MINTER_X86
template <typename In, typename Out>
TARGET_AVX2 void forward_avx2(const Warp& w, int64_t begin, int64_t end, void* output) {
  if constexpr (std::is_same_v<In, uint8_t>) {
    if (suits_bytes(w)) return avx2::forward_bytes<Out>(w, begin, end, output);
  }
  forward_images<In, Out>(w, begin, end, output);
}

template <typename In>
TARGET_AVX2 void backward_avx2(const Warp& w, int64_t begin, int64_t end, const float* grad, float* grad_images,
                               double* grad_coefficients) {
  backward_images<In>(w, begin, end, grad, grad_images, grad_coefficients);
}

template <typename In, typename Out>
TARGET_AVX512 void forward_avx512(const Warp& w, int64_t begin, int64_t end, void* output) {
  if constexpr (std::is_same_v<In, uint8_t>) {
    if (suits_bytes(w)) return avx512::forward_bytes<Out>(w, begin, end, output);
  }
  forward_images<In, Out>(w, begin, end, output);
}

template <typename In>
TARGET_AVX512 void backward_avx512(const Warp& w, int64_t begin, int64_t end, const float* grad, float* grad_images,
                                   double* grad_coefficients) {
  backward_images<In>(w, begin, end, grad, grad_images, grad_coefficients);
}
#endif

bool supported(Target target) {
#ifdef MINTER_X86
  if (target == Target::avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (target == Target::avx2) return __builtin_cpu_supports("avx2");
#endif
  return target == Target::portable;
}

Target current_target = supported(Target::avx512) ? Target::avx512
                        : supported(Target::avx2) ? Target::avx2
                                                  : Target::portable;

template <typename In, typename Out>
auto choose_forward() {
#ifdef MINTER_X86
  if (current_target == Target::avx512) return &forward_avx512<In, Out>;
  if (current_target == Target::avx2) return &forward_avx2<In, Out>;
#endif
  return &forward_portable<In, Out>;
}

template <typename In>
auto choose_backward() {
#ifdef MINTER_X86
  if (current_target == Target::avx512) return &backward_avx512<In>;
  if (current_target == Target::avx2) return &backward_avx2<In>;
#endif
  return &backward_portable<In>;
}

// Images a thread takes at least: some 32 thousand pixels repay waking it.
template <typename Work>
void over_images(const Warp& w, Work work) {
  const int64_t grain = 1 + 32768 / std::max<int64_t>(1, w.height * w.width);
  torch::stable::parallel_for(0, w.batch, grain, work);
}

bool fits_32_bits(const Warp& w) {
  return w.height < (1 << 24) && w.width < (1 << 24) && (w.height + 2) * (w.width + 2) < (int64_t{1} << 30);
}

// New memory of a large output is handed out by the system page by page as it is written: ask for large pages.
void advise(void* output, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(output) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(output) + bytes) / page * page;
  if (bytes >= 16 * static_cast<int64_t>(page)) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

template <typename In, typename Out>
void forward(const Warp& w, void* output) {
  advise(output, w.batch * w.channels * w.height * w.width * static_cast<int64_t>(sizeof(Out)));
  if constexpr (std::is_same_v<In, double>) {
    over_images(w, [&](int64_t begin, int64_t end) { forward_plain<double, double, double>(w, begin, end, output); });
  } else if (fits_32_bits(w)) {
    const auto images = choose_forward<In, Out>();
    over_images(w, [&](int64_t begin, int64_t end) { images(w, begin, end, output); });
  } else {
    over_images(w, [&](int64_t begin, int64_t end) { forward_plain<float, In, Out>(w, begin, end, output); });
  }
}

template <typename Real, typename In>
void backward(const Warp& w, const void* grad, void* grad_images, double* grad_coefficients) {
  const Real* from = static_cast<const Real*>(grad);
  Real* to = static_cast<Real*>(grad_images);
  if constexpr (std::is_same_v<Real, float>) {
    if (fits_32_bits(w)) {
      const auto images = choose_backward<In>();
      return over_images(w, [&](int64_t begin, int64_t end) { images(w, begin, end, from, to, grad_coefficients); });
    }
  }
  over_images(w, [&](int64_t begin, int64_t end) {
    backward_plain<Real, In>(w, begin, end, from, to, grad_coefficients);
  });
}

void check_index(const Warp& w) {
  for (int64_t n = 0; w.index && n < w.batch; ++n) {
    STD_TORCH_CHECK(w.index[n] >= 0 && w.index[n] < w.num_images, "minter::warp: index ", w.index[n],
                    " is out of range for ", w.num_images, " images");
  }
}

const char* const target_names[] = {"portable", "avx2", "avx512"};

}  // namespace

std::vector<std::string> cpu_targets() {
  std::vector<std::string> names{target_names[static_cast<int>(current_target)]};
  for (int i = 0; i < 3; ++i) {
    if (supported(static_cast<Target>(i))) names.push_back(target_names[i]);
  }
  return names;
}

bool set_cpu_target(const std::string& name) {
  for (int i = 0; i < 3; ++i) {
    if (name != target_names[i] || !supported(static_cast<Target>(i))) continue;
    current_target = static_cast<Target>(i);
    return true;
  }
  return false;
}

void warp_cpu(const Warp& w, Type in, Type out, void* output) {
  check_index(w);
  if (in == Type::float64) return forward<double, double>(w, output);
  if (in == Type::float32 && out == Type::float32) return forward<float, float>(w, output);
  if (in == Type::float32) return forward<float, BFloat16>(w, output);
  if (out == Type::uint8) return forward<uint8_t, uint8_t>(w, output);
  if (out == Type::float32) return forward<uint8_t, float>(w, output);
  return forward<uint8_t, BFloat16>(w, output);
}

void warp_backward_cpu(const Warp& w, Type in, const void* grad, void* grad_images, double* grad_coefficients) {
  check_index(w);
  if (in == Type::float64) return backward<double, double>(w, grad, grad_images, grad_coefficients);
  if (in == Type::float32) return backward<float, float>(w, grad, grad_images, grad_coefficients);
  return backward<float, uint8_t>(w, grad, grad_images, grad_coefficients);
}

}  // namespace minter
