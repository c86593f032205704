// The warp on the CPU: threads over images, one pass over the output, no temporary but a frame for one image.
//
// The forward warp of uint8 and float32 images is in warp_simd.h, compiled for AVX-512, for AVX2 and for every
// processor; which one runs is decided when the module is loaded. All give the same bits. float64 images, those too
// large for 32-bit offsets, and gradients go through one pixel after the other.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "warp.h"

#if defined(__x86_64__)
#define MINTER_X86
#include <immintrin.h>
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace minter {
namespace {

using BFloat16 = torch::headeronly::BFloat16;

// What an output element is stored as.
template <typename Out>
using Bits = std::conditional_t<std::is_same_v<Out, BFloat16>, uint16_t, Out>;

// ---------------------------------------------------------------------------------- what all instruction sets share

constexpr int64_t kBlock = 256;     // pixels that pass from step to step in the first-level cache
constexpr int kMostLanes = 16;      // numbers of 32 bits in a vector
constexpr float kOutside = -1.0f;   // in place of the fraction

// Where the pixels of a block are read: the word of the upper left tap in a frame, 0 outside, and the fractions.
struct Block { alignas(64) int32_t at[kBlock + kMostLanes]; float fx[kBlock + kMostLanes], fy[kBlock + kMostLanes]; };

// Of a frame: eight bytes for up to three uint8 channels, or one float.
template <typename In>
using Word = std::conditional_t<std::is_same_v<In, uint8_t>, uint64_t, uint32_t>;

template <typename In>
struct Frame {
  int64_t planes, pitch, plane_words;
  std::vector<Word<In>> words;

  explicit Frame(const Warp& w)
      : planes((w.channels + kPacked<In> - 1) / kPacked<In>),
        pitch((w.width + 9) / 8 * 8),
        plane_words((w.height + 2) * pitch),
        words(planes * plane_words + 3 * kMostLanes) {}

  Word<In>* plane(int64_t p) {  // so that the window's columns begin at a line of the cache
    const uintptr_t first = reinterpret_cast<uintptr_t>(words.data() + 1), line = (first + 63) / 64 * 64;
    return reinterpret_cast<Word<In>*>(line) - 1 + p * plane_words;
  }
};

// What becomes of a channel's interpolated value: value * scale + offset; and what is written outside, likewise
// counted.
struct Channel { float scale, offset, fill; };

// One NaN for all: its first 16 bits are one too, and no addition to its bits overflows.
inline float usual(float value) { return value == value ? value : std::numeric_limits<float>::quiet_NaN(); }

template <typename In, typename Out>
std::vector<Channel> make_channels(const Warp& w) {
  std::vector<Channel> channels(w.channels);
  for (int64_t c = 0; c < w.channels; ++c) {
    const float scale = w.scale ? usual(w.scale[c]) : 1.0f;
    const float offset = std::is_same_v<Out, uint8_t> ? 8388608.0f : w.shift ? usual(w.shift[c]) : 0.0f;
    channels[c] = {std::is_same_v<In, uint8_t> ? scale * (-1.0f / 32768) : scale, offset,
                   usual(fill_value<Out>(w)) * scale + offset};
  }
  return channels;
}

// Columns' centres, counted from the image's; the last one's again for the rest of a vector.
std::vector<float> make_centres(const Warp& w) {
  std::vector<float> centres(w.width + kMostLanes);
  for (int64_t i = 0; i < w.width + kMostLanes; ++i) {
    centres[i] = static_cast<float>(std::min(i, w.width - 1) + 0.5 - 0.5 * w.width);
  }
  return centres;
}

// The next image, which may lie anywhere in memory, is fetched while this one is worked on. Inlined: GCC
// removes calls of a function that does nothing else.
template <typename In>
ALWAYS_INLINE void prefetch(const Warp& w, int64_t n) {
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
}

// ------------------------------------------------------------------------------------------- one file, three times

#define LOCAL TARGET ALWAYS_INLINE
#ifdef MINTER_X86
namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define MINTER_LANES 16
constexpr int kLanes = MINTER_LANES;
#include "warp_simd.h"
#undef MINTER_LANES
#undef TARGET
}  // namespace avx512

namespace avx2 {
#define TARGET __attribute__((target("avx2")))
#define MINTER_LANES 8
constexpr int kLanes = MINTER_LANES;
#include "warp_simd.h"
#undef MINTER_LANES
#undef TARGET
}  // namespace avx2
#endif

namespace portable {
#define TARGET
#define MINTER_LANES 4
constexpr int kLanes = MINTER_LANES;
#include "warp_simd.h"
}  // namespace portable

// -------------------------------------------------------------------------------------- one pixel after the other

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
      const Real outside = std::is_same_v<Real, double> ? static_cast<Real>(w.fill) : fill_value<Out>(w);
      for (int64_t c = 0; c < w.channels; ++c) {
        const Real value = normalized(w, is_inside ? bilinear<Real, In>(w, t, c) : outside, c);
        output[c * pixels + i] = static_cast<Out>(std::is_same_v<Out, uint8_t> ? std::nearbyint(value) : value);
      }
    }
  }
}

template <typename Real, typename In>
void backward_plain(const Warp& w, int64_t begin, int64_t end, const Real* grad, Real* grad_images,
                    double* grad_coefficients) {
  const int64_t pixels = w.height * w.width;
  for (int64_t n = begin; n < end; ++n) {
    const Coefficients coefficients = load_coefficients(w, n);
    const View view = load_view(w, n);
    const Real* of_image = grad + n * w.channels * pixels;
    double sums[8] = {};
    for (int64_t i = 0; i < pixels; ++i) {
      add_gradients<Real, In>(w, view, coefficients, of_image, i, grad_images, grad_coefficients != nullptr, sums);
    }
    if (grad_coefficients) std::copy(sums, sums + 8, grad_coefficients + n * 8);
  }
}

// ---------------------------------------------------------------------------------------------------------- dispatch

// The best comes last.
const char* const target_names[] = {"portable", "avx2", "avx512"};

bool supported(int target) {
#ifdef MINTER_X86
  if (target == 1) return __builtin_cpu_supports("avx2");
  if (target == 2) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return target == 0;
}

int current_target = supported(2) ? 2 : supported(1) ? 1 : 0;

template <typename In, typename Out>
auto choose_forward() {
#ifdef MINTER_X86
  if (current_target == 2) return &avx512::forward<In, Out>;
  if (current_target == 1) return &avx2::forward<In, Out>;
#endif
  return &portable::forward<In, Out>;
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
  auto images = &forward_plain<std::conditional_t<std::is_same_v<In, double>, double, float>, In, Out>;
  if constexpr (!std::is_same_v<In, double>) {
    if (fits_32_bits(w)) images = choose_forward<In, Out>();
  }
  over_images(w, [&](int64_t begin, int64_t end) { images(w, begin, end, output); });
}

template <typename Real, typename In>
void backward(const Warp& w, const void* grad, void* grad_images, double* grad_coefficients) {
  over_images(w, [&](int64_t begin, int64_t end) {
    backward_plain<Real, In>(w, begin, end, static_cast<const Real*>(grad), static_cast<Real*>(grad_images),
                             grad_coefficients);
  });
}

void check_index(const Warp& w) {
  for (int64_t n = 0; w.index && n < w.batch; ++n) {
    STD_TORCH_CHECK(w.index[n] >= 0 && w.index[n] < w.num_images, "minter::warp: index ", w.index[n],
                    " is out of range for ", w.num_images, " images");
  }
}

}  // namespace

std::vector<std::string> cpu_targets() {
  std::vector<std::string> names{target_names[current_target]};
  for (int i = 0; i < 3; ++i) {
    if (supported(i)) names.push_back(target_names[i]);
  }
  return names;
}

bool set_cpu_target(const std::string& name) {
  for (int i = 0; i < 3; ++i) {
    if (name != target_names[i] || !supported(i)) continue;
    current_target = i;
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
