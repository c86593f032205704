// The warp on the CPU: threads over images, one pass over the output, no temporary.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "warp.h"

namespace minter {
namespace {

using BFloat16 = torch::headeronly::BFloat16;

template <typename Out, typename Real>
Out convert(Real value) {
  if constexpr (std::is_same_v<Out, uint8_t>) {
    return static_cast<uint8_t>(std::nearbyint(std::min(std::max(value, Real(0)), Real(255))));
  } else {
    return static_cast<Out>(value);
  }
}

// Images a thread takes at least: some 32 thousand pixels repay waking it.
int64_t grain(const Warp& w) { return 1 + 32768 / std::max<int64_t>(1, w.height * w.width); }

template <typename Real, typename In, typename Out>
void forward_image(const Warp& w, int64_t n, Out* output) {
  const Coefficients coefficients = load_coefficients(w, n);
  const View view = load_view(w, n);
  const int64_t pixels = w.height * w.width;
  output += n * w.channels * pixels;
  for (int64_t y = 0, i = 0; y < w.height; ++y) {
    for (int64_t x = 0; x < w.width; ++x, ++i) {
      const Point point = source_point(coefficients, y, x);
      if (inside(view, point)) {
        const Taps<Real> t = taps<Real>(w, view, point);
        for (int64_t c = 0; c < w.channels; ++c) {
          output[c * pixels + i] = convert<Out>(normalized(w, bilinear<Real, In>(w, t, c), c));
        }
      } else {
        for (int64_t c = 0; c < w.channels; ++c) {
          output[c * pixels + i] = convert<Out>(normalized(w, static_cast<Real>(w.fill), c));
        }
      }
    }
  }
}

template <typename Real, typename In>
void backward_image(const Warp& w, int64_t n, const Real* grad, In* grad_images, double* grad_coefficients) {
  const Coefficients coefficients = load_coefficients(w, n);
  const View view = load_view(w, n);
  const int64_t pixels = w.height * w.width;
  Warp target = w;  // offsets into the gradient of the images, which is contiguous and has no index
  target.stride_n = w.channels * pixels, target.stride_h = w.width, target.stride_w = 1;
  double sums[8] = {};
  grad += n * w.channels * pixels;
  for (int64_t y = 0, i = 0; y < w.height; ++y) {
    for (int64_t x = 0; x < w.width; ++x, ++i) {
      const Point point = source_point(coefficients, y, x);
      if (!inside(view, point)) continue;
      if (grad_coefficients) {
        double du = 0, dv = 0;
        point_gradient<Real, In>(w, taps<Real>(w, view, point), [&](int64_t c) { return grad[c * pixels + i]; }, du, dv);
        add_coefficient_gradient(point, du, dv, sums);
      }
      if constexpr (!std::is_same_v<In, uint8_t>) {
        if (!grad_images) continue;
        const Taps<Real> t = taps<Real>(target, view, point);
        for (int k = 0; k < 4; ++k) {
          if (t.at[k] < 0) continue;
          for (int64_t c = 0; c < w.channels; ++c) {
            const Real scale = w.scale ? static_cast<Real>(w.scale[c]) : Real(1);
            grad_images[t.at[k] + c * pixels] += grad[c * pixels + i] * scale * tap_weight(t, k);
          }
        }
      }
    }
  }
  if (grad_coefficients) std::copy(sums, sums + 8, grad_coefficients + n * 8);
}

template <typename Real, typename In, typename Out>
void forward(const Warp& w, void* output) {
  torch::stable::parallel_for(0, w.batch, grain(w), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) forward_image<Real, In>(w, n, static_cast<Out*>(output));
  });
}

template <typename Real, typename In>
void backward(const Warp& w, const void* grad, void* grad_images, double* grad_coefficients) {
  torch::stable::parallel_for(0, w.batch, grain(w), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      backward_image(w, n, static_cast<const Real*>(grad), static_cast<In*>(grad_images), grad_coefficients);
    }
  });
}

void check_index(const Warp& w) {
  for (int64_t n = 0; w.index && n < w.batch; ++n) {
    STD_TORCH_CHECK(w.index[n] >= 0 && w.index[n] < w.num_images, "minter::warp: index ", w.index[n],
                    " is out of range for ", w.num_images, " images");
  }
}

}  // namespace

void warp_cpu(const Warp& w, Type in, Type out, void* output) {
  check_index(w);
  if (in == Type::float64) return forward<double, double, double>(w, output);
  if (in == Type::float32 && out == Type::float32) return forward<float, float, float>(w, output);
  if (in == Type::float32) return forward<float, float, BFloat16>(w, output);
  if (out == Type::uint8) return forward<float, uint8_t, uint8_t>(w, output);
  if (out == Type::float32) return forward<float, uint8_t, float>(w, output);
  return forward<float, uint8_t, BFloat16>(w, output);
}

void warp_backward_cpu(const Warp& w, Type in, const void* grad, void* grad_images, double* grad_coefficients) {
  check_index(w);
  if (in == Type::float64) return backward<double, double>(w, grad, grad_images, grad_coefficients);
  if (in == Type::float32) return backward<float, float>(w, grad, grad_images, grad_coefficients);
  return backward<float, uint8_t>(w, grad, grad_images, grad_coefficients);
}

}  // namespace minter
