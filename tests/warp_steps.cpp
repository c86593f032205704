// Runs the steps of the CUDA kernel (csrc/warp_cuda.cu) on the host: for each image, each step for one thread after the
// other in the order given, then the next step, which is what barriers make of them on a device.
#include <cstdint>
#include <vector>

#include "warp_cuda.cu"

using namespace minter;

namespace {

constexpr uint32_t kCanary = 0xdeadbeef;

template <typename In, typename Out, int kChannels, int kPixels>
int run_staged(const Warp& w, const Plan& plan, const int32_t* order, Out* output) {
  const int planes = planes_of<In, kChannels>(w);
  const size_t words = plan.bytes / sizeof(uint32_t);
  std::vector<uint32_t> tile(words + 64, kCanary);
  const auto all_threads = [&](auto step) {
    for (int i = 0; i < kThreads; ++i) step(order[i]);
  };
  for (int64_t n = 0; n < w.batch; ++n) {
    const Tile t = make_tile(w, n);
    if (t.image < 0) return 1;
    const CentredMap map = centre(load_coefficients(w, n), load_view(w, n), w.height, w.width);
    if (t.rows > 0 && t.columns > 0) {
      if (reaches_beyond(w, t)) all_threads([&](int thread) { blacken(t, planes, tile.data(), thread); });
      all_threads([&](int thread) { copy_in<In, kChannels>(w, t, plan.reads_fours, tile.data(), thread); });
      all_threads([&](int thread) { repeat_border(t, planes, tile.data(), thread); });
    }
    Out* out = output + n * w.channels * w.height * w.width;
    all_threads([&](int thread) { sample<In, Out, kChannels, kPixels>(w, n, map, t, tile.data(), thread, out); });
  }
  for (size_t i = words; i < tile.size(); ++i) {
    if (tile[i] != kCanary) return 2;
  }
  return 0;
}

template <typename In, typename Out>
int run_direct(const Warp& w, const int32_t* order, Out* output) {
  const int64_t pixels = w.height * w.width;
  for (int64_t n = 0; n < w.batch; ++n) {
    const View view = load_view(w, n);
    if (view.image < 0) return 1;
    const CentredMap map = centre(load_coefficients(w, n), view, w.height, w.width);
    for (int i = 0; i < kThreads; ++i) {
      for (int64_t pixel = order[i]; pixel < pixels; pixel += kThreads) {
        sample_directly<float, In, Out>(w, n, map, view, pixel, output + n * w.channels * pixels);
      }
    }
  }
  return 0;
}

template <typename In, typename Out>
int run(const Warp& w, const int32_t* order, void* output, int32_t* variant) {
  const Plan plan = make_plan<In, Out>(w, output);
  Out* out = static_cast<Out*>(output);
  *variant = !plan.staged ? 0 : !plan.writes_fours ? 1 : w.channels != 3 ? 2 : 3;
  if (*variant == 0) return run_direct<In, Out>(w, order, out);
  if (*variant == 1) return run_staged<In, Out, 0, 1>(w, plan, order, out);
  if (*variant == 2) return run_staged<In, Out, 0, 4>(w, plan, order, out);
  return run_staged<In, Out, 3, 4>(w, plan, order, out);
}

}  // namespace

// Arguments as the members of Warp; in, out: 0 uint8, 1 float32, 2 bfloat16. Sets the variant of the kernel that was run.
// Returns 0, 1 for an index out of range, 2 for a write beyond the tile.
extern "C" int warp_steps(const void* images, const int64_t* index, const int64_t* crop, const int64_t* window,
                          const void* coefficients, const float* scale, const float* shift, const int64_t* sizes,
                          const int64_t* strides, double fill, int double_coefficients, int in, int out,
                          const int32_t* order, void* output, int32_t* variant) {
  const Warp w{images,   index,      crop,       window,     coefficients, scale,
               shift,    sizes[0],   sizes[1],   sizes[2],   sizes[3],     sizes[4],
               strides[0], strides[1], strides[2], strides[3], fill,       double_coefficients != 0};
  if (in == 0 && out == 0) return run<uint8_t, uint8_t>(w, order, output, variant);
  if (in == 0 && out == 1) return run<uint8_t, float>(w, order, output, variant);
  if (in == 0) return run<uint8_t, BFloat16>(w, order, output, variant);
  if (out == 1) return run<float, float>(w, order, output, variant);
  return run<float, BFloat16>(w, order, output, variant);
}

extern "C" int threads_of_a_block() { return kThreads; }
