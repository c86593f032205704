// The geometry of a batched projective warp, shared by the CPU and the CUDA kernel.
//
// Convention (that of PIL's Image.transform(PERSPECTIVE, BILINEAR)): eight numbers (a, b, c, d, e, f, g, h) map the
// centre (x + 1/2, y + 1/2) of an output pixel to the point (u, v) of the input it is read from,
//     u = (a x + b y + c) / (g x + h y + 1),   v = (d x + e y + f) / (g x + h y + 1).
// Inside 0 <= u < W, 0 <= v < H the value is bilinear with clamped taps; outside, and wherever u or v is not a
// number, it is the fill value. A negative denominator is nothing special. With a window, the image is that window: no
// point outside it is inside, and no tap reaches beyond it (so that a resized crop is torchvision's).
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#ifdef __CUDACC__
#define WARP_INLINE __host__ __device__ __forceinline__
#else
#define WARP_INLINE inline
#endif

namespace minter {

// Everything a kernel reads. Optional inputs are null. Passed by value to the CUDA kernel.
struct Warp {
  const void* images;           // (images, channels, height, width), uint8 | float | double, any strides
  const int64_t* index;         // (batch,): which image each output is made from; null: the n-th from the n-th
  const int64_t* crop;          // (batch, 3): rows down, columns right, flip; null: none
  const int64_t* window;        // (batch, 4): top, left, height, width; null: the whole image
  const void* coefficients;     // (batch, 8), float | double; null: the identity
  const float* scale;           // (channels,): output = value * scale + shift; null: 1
  const float* shift;           // (channels,); null: 0
  int64_t num_images, batch, channels, height, width;
  int64_t stride_n, stride_c, stride_h, stride_w;  // of images, in elements
  double fill;
  bool double_coefficients;
};

struct Coefficients { double a, b, c, d, e, f, g, h; };

WARP_INLINE double coefficient(const Warp& w, int64_t n, int k) {
  return w.double_coefficients ? static_cast<const double*>(w.coefficients)[n * 8 + k]
                               : static_cast<const float*>(w.coefficients)[n * 8 + k];
}

WARP_INLINE Coefficients load_coefficients(const Warp& w, int64_t n) {
  if (w.coefficients == nullptr) return {1, 0, 0, 0, 1, 0, 0, 0};
  return {coefficient(w, n, 0), coefficient(w, n, 1), coefficient(w, n, 2), coefficient(w, n, 3),
          coefficient(w, n, 4), coefficient(w, n, 5), coefficient(w, n, 6), coefficient(w, n, 7)};
}

// A view of one source image after crop and flip: where pixel (y, x) of that view lies in memory, and which are read.
struct View {
  int64_t image;      // which image, or -1 if the index is out of range
  int64_t down, right;
  bool flip;
  int64_t top, left, bottom, end;  // pixels top <= y < bottom, left <= x < end
};

WARP_INLINE int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

WARP_INLINE View load_view(const Warp& w, int64_t n) {
  View view{w.index ? w.index[n] : n, 0, 0, false, 0, 0, w.height, w.width};
  if (view.image < 0 || view.image >= w.num_images) view.image = -1;
  if (w.crop) {  // a shift by more than the image leaves nothing of it: clamping keeps the sums below from overflowing
    view.down = clamp(w.crop[n * 3], -w.height, w.height);
    view.right = clamp(w.crop[n * 3 + 1], -w.width, w.width);
    view.flip = w.crop[n * 3 + 2] != 0;
  }
  if (w.window) {  // what of it lies within the image; the first clamping keeps the sums from overflowing
    constexpr int64_t far = int64_t{1} << 40;
    const int64_t top = clamp(w.window[n * 4], -far, far), left = clamp(w.window[n * 4 + 1], -far, far);
    view.top = clamp(top, 0, w.height), view.left = clamp(left, 0, w.width);
    view.bottom = clamp(top + clamp(w.window[n * 4 + 2], 0, far), view.top, w.height);
    view.end = clamp(left + clamp(w.window[n * 4 + 3], 0, far), view.left, w.width);
  }
  return view;
}

// Element offset (channel 0) of pixel (y, x) of the view, or -1 where the crop reaches beyond the image (black there).
WARP_INLINE int64_t offset(const Warp& w, const View& view, int64_t y, int64_t x) {
  y += view.down;
  x = (view.flip ? w.width - 1 - x : x) + view.right;
  if (y < 0 || y >= w.height || x < 0 || x >= w.width) return -1;
  return view.image * w.stride_n + y * w.stride_h + x * w.stride_w;
}

// Whether a point is inside is decided to the last bit as PIL and the PyTorch reference decide it: each product and
// each sum rounded, none fused (the compiler is told not to, and CUDA's intrinsics never are), and a division, not a
// product with the inverse.
WARP_INLINE double product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

WARP_INLINE double sum(double a, double b, double c) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(__dadd_rn(a, b), c);
#else
  return a + b + c;
#endif
}

// The source point of an output pixel, and what the coefficients' gradient needs of it.
struct Point { double x, y, u, v, inverse; };

WARP_INLINE Point source_point(const Coefficients& k, int64_t row, int64_t column) {
  const double x = column + 0.5, y = row + 0.5;
  const double denominator = sum(product(k.g, x), product(k.h, y), 1.0);
  return {x, y, sum(product(k.a, x), product(k.b, y), k.c) / denominator,
          sum(product(k.d, x), product(k.e, y), k.f) / denominator, 1.0 / denominator};
}

// Written so that NaN is outside.
WARP_INLINE bool inside(const View& view, const Point& p) {
  return p.u >= static_cast<double>(view.left) && p.u < static_cast<double>(view.end) &&
         p.v >= static_cast<double>(view.top) && p.v < static_cast<double>(view.bottom);
}

// The source column where the window begins, or with a flip ends.
WARP_INLINE int64_t source_column(const Warp& w, const View& view) {
  return view.right + (view.flip ? w.width - view.end : view.left);
}

// The largest doubt, in pixels, with which float32 stays within 0.02 grey levels on the CPU, measured. Steeper maps,
// which magnify its rounding, are computed in float64; of those that the methods draw, one in 20,000 at 96 pixels a
// side, one in 16 at 256.
constexpr double kMaxDoubt = 3e-4;

// A map for float32, about the centres of image and window: u - centre = (au x + bu y + cu) / (g x + h y + w), v
// likewise, with x and y counted from the centre of the output. Computed once for an image, in float64. Near the centre
// float32 is precise, to about a hundred-thousandth of a pixel at 32 x 32. Whether a point is inside is still decided
// as in float64: a point too close to the border for float32 to tell, and all points of a map that is steep or whose
// horizon comes near, are to be computed once more, by source_point, as are all of images of more than 256 pixels a
// side.
struct CentredMap {
  float au, bu, cu, av, bv, cv, g, h, w;
  float half_u, half_v;    // of the window: inside is -half <= u - centre < half
  float doubt_u, doubt_v;  // float32 cannot tell what is this close to the border
  bool exact;              // float32 will not do: a steep map, a denominator close to 0, or what is not a number
};

WARP_INLINE CentredMap centre(const Coefficients& k, const View& view, int64_t height, int64_t width) {
  const double x = 0.5 * width, y = 0.5 * height;
  const double half_u = 0.5 * (view.end - view.left), half_v = 0.5 * (view.bottom - view.top);
  const double u = view.left + half_u, v = view.top + half_v;
  const double w = k.g * x + k.h * y + 1;
  const double au = k.a - u * k.g, bu = k.b - u * k.h, cu = k.a * x + k.b * y + k.c - u * w;
  const double av = k.d - v * k.g, bv = k.e - v * k.h, cv = k.d * x + k.e * y + k.f - v * w;
  const double spread = fabs(k.g) * x + fabs(k.h) * y, least = w - spread, most = w + spread;
  // Coefficients, products and sums are rounded by 2^-24 of what they add up, at most four times above and below, the
  // quotient by three times that, as is the product with an approximate inverse; 2^-21 is eight times.
  const double unit = 1.0 / (1 << 21), inverse = 1 / least;
  const double doubt_u = unit * ((fabs(au) * x + fabs(bu) * y + fabs(cu) + half_u * most) * inverse + half_u);
  const double doubt_v = unit * ((fabs(av) * x + fabs(bv) * y + fabs(cv) + half_v * most) * inverse + half_v);
  const bool small = height <= 256 && width <= 256;  // above that float32 is off by more than that
  const bool sound = small && least > 1e-3 && most < 1e3 && doubt_u < kMaxDoubt && doubt_v < kMaxDoubt;
  const auto f = [](double value) { return static_cast<float>(value); };
  return {f(au), f(bu), f(cu), f(av), f(bv), f(cv), f(k.g), f(k.h), f(w),
          f(half_u), f(half_v), f(doubt_u), f(doubt_v), !sound};
}

// Channels that the kernels pack into one 32-bit word of a pixel.
template <typename In>
constexpr int kPacked = std::is_same_v<In, uint8_t> ? 3 : 1;

// The four taps of a point inside: offsets in the order (y0 x0) (y0 x1) (y1 x0) (y1 x1), and the fractions.
template <typename Real>
struct Taps { int64_t at[4]; Real fx, fy; };

template <typename Real>
WARP_INLINE Taps<Real> taps(const Warp& w, const View& view, const Point& p) {
  const double u = p.u - 0.5, v = p.v - 0.5;  // in [-0.5, size - 0.5)
  const int64_t x = u < 0.0 ? -1 : static_cast<int64_t>(u), y = v < 0.0 ? -1 : static_cast<int64_t>(v);
  const int64_t x0 = x < view.left ? view.left : x, x1 = x + 1 < view.end ? x + 1 : view.end - 1;
  const int64_t y0 = y < view.top ? view.top : y, y1 = y + 1 < view.bottom ? y + 1 : view.bottom - 1;
  return {{offset(w, view, y0, x0), offset(w, view, y0, x1), offset(w, view, y1, x0), offset(w, view, y1, x1)},
          static_cast<Real>(u - x), static_cast<Real>(v - y)};
}

template <typename Real, typename In>
WARP_INLINE Real fetch(const Warp& w, int64_t at, int64_t channel) {
  return at < 0 ? Real(0) : static_cast<Real>(static_cast<const In*>(w.images)[at + channel * w.stride_c]);
}

template <typename Real, typename In>
WARP_INLINE Real bilinear(const Warp& w, const Taps<Real>& t, int64_t channel) {
  const Real top = fetch<Real, In>(w, t.at[0], channel) * (1 - t.fx) + fetch<Real, In>(w, t.at[1], channel) * t.fx;
  const Real low = fetch<Real, In>(w, t.at[2], channel) * (1 - t.fx) + fetch<Real, In>(w, t.at[3], channel) * t.fx;
  return top * (1 - t.fy) + low * t.fy;
}

template <typename Real>
WARP_INLINE Real normalized(const Warp& w, Real value, int64_t channel) {
  if (w.scale) value *= static_cast<Real>(w.scale[channel]);
  if (w.shift) value += static_cast<Real>(w.shift[channel]);
  return value;
}

// The value outside the image, in the output's range where that has one. NaN becomes 0 there.
template <typename Out>
WARP_INLINE float fill_value(const Warp& w) {
  const float fill = static_cast<float>(w.fill);
  if (!std::is_same_v<Out, uint8_t>) return fill;
  return fill > 0.0f ? (fill < 255.0f ? fill : 255.0f) : 0.0f;
}

// d loss / d coefficients of one pixel, given d loss / d (u, v): the quotient rule.
WARP_INLINE void add_coefficient_gradient(const Point& p, double du, double dv, double (&gradient)[8]) {
  du *= p.inverse;
  dv *= p.inverse;
  const double dw = -(du * p.u + dv * p.v);
  gradient[0] += du * p.x, gradient[1] += du * p.y, gradient[2] += du;
  gradient[3] += dv * p.x, gradient[4] += dv * p.y, gradient[5] += dv;
  gradient[6] += dw * p.x, gradient[7] += dw * p.y;
}

template <typename Real>
WARP_INLINE void add(Real* to, Real value) {
#ifdef __CUDA_ARCH__
  atomicAdd(to, value);
#else
  *to += value;
#endif
}

// The gradients through pixel i of one image, of which `grad` is that of the output: into the images', which may be
// null, and the sums of the coefficients', where they are wanted.
template <typename Real, typename In>
WARP_INLINE void add_gradients(const Warp& w, const View& view, const Coefficients& k, const Real* grad, int64_t i,
                               Real* grad_images, bool sums_wanted, double (&sums)[8]) {
  const int64_t pixels = w.height * w.width;
  const Point point = source_point(k, i / w.width, i % w.width);
  if (!inside(view, point)) return;
  if (sums_wanted) {
    const Taps<Real> t = taps<Real>(w, view, point);
    double du = 0, dv = 0;
    for (int64_t c = 0; c < w.channels; ++c) {
      const Real p00 = fetch<Real, In>(w, t.at[0], c), p01 = fetch<Real, In>(w, t.at[1], c);
      const Real p10 = fetch<Real, In>(w, t.at[2], c), p11 = fetch<Real, In>(w, t.at[3], c);
      const double g = static_cast<double>(grad[c * pixels + i]) * (w.scale ? w.scale[c] : 1.0f);
      du += g * ((p01 - p00) * (1 - t.fy) + (p11 - p10) * t.fy);
      dv += g * ((p10 - p00) * (1 - t.fx) + (p11 - p01) * t.fx);
    }
    add_coefficient_gradient(point, du, dv, sums);
  }
  if (!grad_images) return;
  Warp target = w;  // offsets into the gradient of the images, which is contiguous and has no index
  target.stride_n = w.channels * pixels, target.stride_h = w.width, target.stride_w = 1;
  const Taps<Real> t = taps<Real>(target, view, point);
  for (int tap = 0; tap < 4; ++tap) {
    const Real weight = (tap % 2 ? t.fx : 1 - t.fx) * (tap / 2 ? t.fy : 1 - t.fy);
    for (int64_t c = 0; t.at[tap] >= 0 && c < w.channels; ++c) {
      const Real scale = w.scale ? static_cast<Real>(w.scale[c]) : Real(1);
      add(grad_images + t.at[tap] + c * pixels, grad[c * pixels + i] * scale * weight);
    }
  }
}

// Output element types. uint8 rounds to nearest even and saturates; the rest convert.
enum class Type { uint8, float32, float64, bfloat16 };

// Implemented in warp_cpu.cpp and warp_cuda.cu. `output` and the gradients are contiguous; the gradients of the images
// (shape of the output; images' type) must be zeroed and may be null, as may those of the coefficients (float64).
void warp_cpu(const Warp&, Type in, Type out, void* output);
void warp_backward_cpu(const Warp&, Type in, const void* grad, void* grad_images, double* grad_coefficients);
// The instructions the CPU kernel was compiled for: the one in use, then all that this processor can run. Setting
// another is for tests and benchmarks; false where the processor lacks it.
std::vector<std::string> cpu_targets();
bool set_cpu_target(const std::string& name);

void warp_cuda(const Warp&, Type in, Type out, void* output, void* stream);
void warp_backward_cuda(const Warp&, Type in, const void* grad, void* grad_images, double* grad_coefficients,
                        void* stream);

}  // namespace minter
