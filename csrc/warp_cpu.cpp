// The warp on the CPU: threads over images, one pass over the output, no temporary larger than an image.
//
// Written as plain loops over blocks of pixels that any compiler can vectorise, and compiled three times on x86-64: for
// AVX-512, for AVX2 and for every processor; which one runs is decided when the module is loaded. All give the same
// result to the last bit (products and sums are not fused). A source image is first copied into a frame of its own,
// with its crop and flip applied and its border repeated around it, three uint8 channels packed into one 32-bit word a
// pixel. A tap then needs no clamping, and one 64-bit load brings two neighbouring pixels with all their channels.
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
constexpr int kBlock = 128;  // pixels of one row that pass from step to step in the first-level cache

// Where the pixels of a block are read: the top left tap of each in a frame (0 for those outside), and the fractions.
struct Block {
  alignas(64) int32_t at[kBlock];
  alignas(64) int32_t inside[kBlock];  // all bits or none
  alignas(64) float fx[kBlock], fy[kBlock];
};

// A source image as the taps see it: the view's window, its border repeated once around it.
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

// `count` words of a frame from the source elements from `from` on.
template <int kChannels, typename In>
ALWAYS_INLINE void copy_words(uint32_t* __restrict__ words, const In* __restrict__ from, int64_t step, int64_t stride_c,
                              int64_t count) {
  for (int64_t x = 0; x < count; ++x) {
    if constexpr (std::is_same_v<In, uint8_t>) {
      uint32_t word = from[x * step];
      if constexpr (kChannels > 1) word |= static_cast<uint32_t>(from[stride_c + x * step]) << 8;
      if constexpr (kChannels > 2) word |= static_cast<uint32_t>(from[2 * stride_c + x * step]) << 16;
      words[x] = word;
    } else {
      words[x] = std::bit_cast<uint32_t>(from[x * step]);
    }
  }
}

template <int kChannels, typename In>
ALWAYS_INLINE void copy_row(uint32_t* words, const In* from, int64_t step, int64_t stride_c, int64_t count) {
  if (step != 1 || count < kLanes) return copy_words<kChannels>(words, from, step, stride_c, count);
  for (int64_t x = 0; x + kLanes <= count; x += kLanes) {
    copy_words<kChannels>(words + x, from + x, 1, stride_c, kLanes);
  }
  const int64_t last = count - kLanes;  // what remains, some of it once more
  copy_words<kChannels>(words + last, from + last, 1, stride_c, kLanes);
}

// One plane of a frame. A flipped view's is mirrored, as the source is.
template <int kChannels, typename In>
ALWAYS_INLINE void fill_plane(const Warp& w, const View& view, const Frame& frame, uint32_t* plane, int64_t channel) {
  const In* image = static_cast<const In*>(w.images) + view.image * w.stride_n + channel * w.stride_c;
  // Frame columns [0, columns) are source columns from `origin` on; those before `first` and from `past` on are black.
  const int64_t origin = view.right + (view.flip ? w.width - view.end : view.left);
  const int64_t first = clamp(-origin, 0, frame.columns), past = clamp(w.width - origin, first, frame.columns);
  for (int64_t y = view.top; y < view.bottom; ++y) {
    uint32_t* row = plane + (y - view.top + 1) * frame.pitch + 1;
    const int64_t source = y + view.down;
    if (source < 0 || source >= w.height || first == past) {
      std::memset(row, 0, frame.columns * sizeof(uint32_t));
    } else {
      for (int64_t x = 0; x < first; ++x) row[x] = 0;
      const In* from = image + source * w.stride_h + (origin + first) * w.stride_w;
      copy_row<kChannels>(row + first, from, w.stride_w, w.stride_c, past - first);
      for (int64_t x = past; x < frame.columns; ++x) row[x] = 0;
    }
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

// What turns a point into a place of the frame. A flipped view's frame is mirrored: there column `left` is column
// columns - left (which is ~left + columns + 1), and the fraction 1 - fx.
struct Placing {
  float start, sign;
  int32_t columns, rows, pitch, mirror, origin;
};

// column, row: of the frame, border included; 0 where mask is.
template <typename Real>
ALWAYS_INLINE void place(const Placing p, Real column, Real row, int32_t mask, int32_t* __restrict__ at,
                         int32_t* __restrict__ inside, float* __restrict__ fx, float* __restrict__ fy) {
  int32_t left = static_cast<int32_t>(column), top = static_cast<int32_t>(row);
  left = left < p.columns ? left : p.columns, top = top < p.rows ? top : p.rows;  // had the sum been rounded up
  *inside = mask;
  *fx = p.start + p.sign * static_cast<float>(column - static_cast<Real>(left));
  *fy = static_cast<float>(row - static_cast<Real>(top));
  *at = (top * p.pitch + (left ^ p.mirror) + p.origin) & mask;
}

// Source points of `count` pixels (a multiple of kLanes) of output row y from column x on.
ALWAYS_INLINE void locate(const Warp& w, const Coefficients& k, const CentredMap& m, const View& view,
                          const Frame& frame, int64_t row, int64_t column, int count, Block& block) {
  const float y = static_cast<float>(row + 0.5 - 0.5 * w.height);
  const float first = static_cast<float>(column + 0.5 - 0.5 * w.width);
  const float au = m.au, bu = m.bu * y + m.cu, av = m.av, bv = m.bv * y + m.cv, g = m.g, h = m.h * y + m.w;
  const float half_u = m.half_u, half_v = m.half_v, doubt_u = m.doubt_u, doubt_v = m.doubt_v;
  const int32_t columns = frame.columns, rows = frame.rows, pitch = frame.pitch;
  const float to_column = half_u + 0.5f, to_row = half_v + 0.5f;
  const Placing p{view.flip ? 1.0f : 0.0f, view.flip ? -1.0f : 1.0f,
                  columns, rows, pitch, view.flip ? -1 : 0, view.flip ? columns + 1 : 0};
  int32_t certain = 0;
  for (int j = 0; j < count; ++j) {
    const float x = first + static_cast<float>(j), inverse = 1.0f / (g * x + h);
    const float u = (au * x + bu) * inverse, v = (av * x + bv) * inverse;
    const float past_u = std::fabs(u) - half_u, past_v = std::fabs(v) - half_v;
    const int32_t sure_u = std::fabs(past_u) > doubt_u ? 1 : 0, sure_v = std::fabs(past_v) > doubt_v ? 1 : 0;
    const int32_t inside_u = past_u < 0.0f ? -1 : 0, inside_v = past_v < 0.0f ? -1 : 0, mask = inside_u & inside_v;
    certain += sure_u & sure_v;
    place(p, select(mask, u + to_column, 0.0f), select(mask, v + to_row, 0.0f), mask, block.at + j, block.inside + j,
          block.fx + j, block.fy + j);
  }
  if (certain == count && !m.exact) return;
  for (int j = 0; j < count; ++j) {
    const Point point = source_point(k, row, column + j);
    const bool is_inside = inside(view, point);
    place(p, is_inside ? point.u - view.left + 0.5 : 0.0, is_inside ? point.v - view.top + 0.5 : 0.0,
          -static_cast<int32_t>(is_inside), block.at + j, block.inside + j, block.fx + j, block.fy + j);
  }
}

// The two upper and the two lower taps of each pixel of the block, side by side.
ALWAYS_INLINE void load_taps(const uint32_t* plane, int64_t pitch, const Block& block, int count,
                             uint32_t* __restrict__ above, uint32_t* __restrict__ below) {
  for (int i = 0; i < count; ++i) {
    const uint32_t* from = plane + block.at[i];
    std::memcpy(above + 2 * i, from, 2 * sizeof(uint32_t));
    std::memcpy(below + 2 * i, from + pitch, 2 * sizeof(uint32_t));
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

// The kChannels channels of a block's words, interpolated, filled, normalised, converted, each to its own output.
template <int kChannels, typename In, typename Out, typename Stored>
ALWAYS_INLINE void interpolate(const Block& block, const uint32_t* __restrict__ above,
                               const uint32_t* __restrict__ below, const Normalization& k, int count,
                               Stored* __restrict__ first, Stored* __restrict__ second, Stored* __restrict__ third) {
  const float fill = k.fill, scale0 = k.scale[0], scale1 = k.scale[1], scale2 = k.scale[2];
  const float offset0 = k.offset[0], offset1 = k.offset[1], offset2 = k.offset[2];
  for (int j = 0; j < count; ++j) {
    const float fx = block.fx[j], fy = block.fy[j], gx = 1 - fx, gy = 1 - fy;
    const uint32_t p00 = above[2 * j], p01 = above[2 * j + 1], p10 = below[2 * j], p11 = below[2 * j + 1];
#define CHANNEL(shift)                                                         \
  select(block.inside[j],                                                      \
         (tap<In>(p00, shift) * gx + tap<In>(p01, shift) * fx) * gy +          \
             (tap<In>(p10, shift) * gx + tap<In>(p11, shift) * fx) * fy,       \
         fill)
    first[j] = converted<Out>(normalized<Out>(CHANNEL(0), scale0, offset0));
    if constexpr (kChannels > 1) second[j] = converted<Out>(normalized<Out>(CHANNEL(8), scale1, offset1));
    if constexpr (kChannels > 2) third[j] = converted<Out>(normalized<Out>(CHANNEL(16), scale2, offset2));
#undef CHANNEL
  }
}

// Images taken by index lie anywhere in memory: the next one is fetched while this one is worked on.
template <typename In>
ALWAYS_INLINE void prefetch(const Warp& w, int64_t n) {
#if defined(__GNUC__)
  const int64_t row = w.width * static_cast<int64_t>(sizeof(In));
  if (!w.index || w.stride_w != 1 || w.channels * w.height * row > 32768) return;
  const In* image = static_cast<const In*>(w.images) + w.index[n] * w.stride_n;
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
  for (int64_t n = begin; n < end; ++n) {
    const Coefficients coefficients = load_coefficients(w, n);
    const View view = load_view(w, n);
    const CentredMap map = centre(coefficients, view, w.height, w.width);
    fill_frame<In>(w, view, frame);
    if (n + 1 < end) prefetch<In>(w, n + 1);
    Stored* output = static_cast<Stored*>(all) + n * w.channels * pixels;
    for (int64_t y = 0; y < w.height; ++y) {
      for (int64_t x = 0; x < w.width; x += kBlock) {
        const int wanted = static_cast<int>(std::min<int64_t>(kBlock, w.width - x));
        const int count = (wanted + kLanes - 1) / kLanes * kLanes;
        locate(w, coefficients, map, view, frame, y, x, count, block);
        for (int64_t c = 0; c < w.channels; c += packed) {
          const uint32_t* plane = frame.words.data() + c / packed * (w.height + 2) * frame.pitch;
          load_taps(plane, frame.pitch, block, count, above, below);
          const int channels = static_cast<int>(std::min(packed, w.channels - c));
          Stored* to[3];
          Normalization k{fill_value<Out>(w), {1, 1, 1}, {0, 0, 0}};
          for (int i = 0; i < 3; ++i) {
            const int64_t channel = c + std::min(i, channels - 1);
            if (w.scale) k.scale[i] = w.scale[channel];
            if (w.shift) k.offset[i] = w.shift[channel];
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

// du, dv += d loss / d (u, v) through one channel. along: -1 for a mirrored frame, else 1.
template <typename In>
ALWAYS_INLINE void add_point_gradients(const Block& block, const uint32_t* __restrict__ above,
                                       const uint32_t* __restrict__ below, int shift, const float* __restrict__ grad,
                                       float scale, float along, int count, float* __restrict__ du,
                                       float* __restrict__ dv) {
  for (int j = 0; j < count; ++j) {
    const float fx = block.fx[j], fy = block.fy[j], g = grad[j] * scale;
    const float p00 = tap<In>(above[2 * j], shift), p01 = tap<In>(above[2 * j + 1], shift);
    const float p10 = tap<In>(below[2 * j], shift), p11 = tap<In>(below[2 * j + 1], shift);
    const float along_x = along * g * ((p01 - p00) * (1 - fy) + (p11 - p10) * fy);
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
    const int64_t origin = view.right + (view.flip ? w.width - view.end : view.left);
    for (int64_t x = clamp(-origin, 0, columns); x < columns && origin + x < w.width; ++x) {
      image[source * w.width + origin + x] = row[x];
    }
  }
}

template <typename In>
ALWAYS_INLINE void backward_images(const Warp& w, int64_t begin, int64_t end, const float* all_grad, float* grad_images,
                                   double* grad_coefficients) {
  constexpr int64_t packed = kPacked<In>;
  const int64_t pixels = w.height * w.width;
  Frame frame = make_frame<In>(w);
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
        const int count = (wanted + kLanes - 1) / kLanes * kLanes;
        locate(w, coefficients, map, view, frame, y, x, count, block);
        for (int i = wanted; i < count; ++i) block.inside[i] = 0, block.at[i] = 0;  // beyond the row
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
                                    view.flip ? -1.0f : 1.0f, count, du, dv);
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
  forward_images<In, Out>(w, begin, end, output);
}

template <typename In>
TARGET_AVX2 void backward_avx2(const Warp& w, int64_t begin, int64_t end, const float* grad, float* grad_images,
                               double* grad_coefficients) {
  backward_images<In>(w, begin, end, grad, grad_images, grad_coefficients);
}

template <typename In, typename Out>
TARGET_AVX512 void forward_avx512(const Warp& w, int64_t begin, int64_t end, void* output) {
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

// A large output is new memory, which the system hands out page by page as it is written: ask for large pages.
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
